import os

import pytest
import torch
from hypothesis import settings

from suffice.folders import cache_folder
from tests.interpreter import speed_up_interpreter

# Tests never ask a hub, and give the same examples every time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Kernels run through Triton's interpreter, which is chosen when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
speed_up_interpreter()
settings.register_profile("suffice", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suffice")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache folder of the run's own, so that profiles of tiny models stay out of the user's; models are shared."""
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    own = tmp_path_factory.getbasetemp() / "suffice"
    own.mkdir()
    (own / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUFFICE_CACHE", str(own))
        yield
