import os

import torch
from hypothesis import settings

# Tests never ask a hub, and give the same examples every time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Kernels run through Triton's interpreter, which is chosen when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile("retain", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("retain")
torch.set_num_threads(1)
