import os
import warnings
from pathlib import Path

import pytest

# PyG compiles parts of itself by a deprecated call when it is imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_geometric.nn  # noqa: F401

from suffice.link.data.graph import Graph, Split, SplitConfig, split_edges
from suffice.link.data.synthetic import block_model


@pytest.fixture(scope="session")
def graph() -> Graph:
    return block_model(nodes=300, classes=3, degree=8, feature_signal=2.0, features=16, seed=1)


@pytest.fixture(scope="session")
def parts(graph: Graph) -> Split:
    return split_edges(graph, SplitConfig(0.1, 0.2), seed=0)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A scratch copy of downloaded data sets, where this machine has them."""
    import shutil

    found = Path(os.environ.get("SUFFICE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (found / "planetoid" / "Cora" / "raw").is_dir():
        pytest.skip("no downloaded data sets: set SUFFICE_TEST_DATA")
    shutil.copytree(found / "planetoid" / "Cora", tmp_path / "planetoid" / "Cora")
    return tmp_path
