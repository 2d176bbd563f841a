"""Programs of the folder `benchmarks` as modules, which import each other as scripts do."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def import_programs(*names):
    """Import programs, yield their modules, and forget afterwards what they have imported from their folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "").parent == FOLDER:
                del sys.modules[name]
