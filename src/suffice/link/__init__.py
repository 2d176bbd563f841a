"""Link prediction on graphs: audit a model for composition bias, correct it, and measure what it keeps."""

import lazy_loader

# The public names are listed in __init__.pyi and imported on first use: PyTorch Geometric takes seconds to import.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
