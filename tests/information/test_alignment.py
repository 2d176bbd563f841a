import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suffice.information.alignment import class_information, cluster_nmi, linear_probe, trace_ratio


def _blobs(distance: float, seed: int = 0, items: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(items) % 3
    means = distance * torch.eye(3, 4)
    return means[classes] + torch.randn(items, 4, generator=generator), classes


@given(seed=st.integers(0, 1000))
def test_trace_ratio_against_scatter_matrices(seed):
    x, y = _blobs(1.0, seed)
    points, labels = x.double().numpy(), y.numpy()
    between = within = 0.0
    for label in set(labels):
        own = points[labels == label]
        shift = own.mean(0) - points.mean(0)
        between += len(own) * np.trace(np.outer(shift, shift))
        within += np.trace((len(own) - 1) * np.cov(own.T))
    assert trace_ratio(x, y) == pytest.approx(between / within)


@given(seed=st.integers(0, 1000), ridge=st.sampled_from([0.01, 0.1, 1.0]))
def test_class_information_against_its_formula(seed, ridge):
    x, y = _blobs(2.0, seed)
    covariance = np.cov(x.double().numpy().T, bias=True)
    alpha = len(covariance) / (ridge * np.trace(covariance))

    def rate(matrix):
        return np.linalg.slogdet(np.eye(4) + alpha * matrix)[1] / 2

    expected = rate(covariance) - sum(
        (y == c).double().mean().item() * rate(np.cov(x[y == c].double().numpy().T, bias=True)) for c in range(3)
    )
    assert class_information(x, y, ridge) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 200), scale=st.floats(0.01, 100))
def test_invariant_to_rotation_scale_shift_and_names(seed, scale):
    x, y = _blobs(1.5, seed)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    moved = scale * (x @ turn) + scale
    renamed = torch.tensor([7, 3, 5])[y]
    for measure in (trace_ratio, class_information):
        assert measure(moved, renamed) == pytest.approx(measure(x, y), rel=1e-3)


def test_all_rise_with_the_distance_and_find_nothing_in_noise():
    for measure, nothing in ((trace_ratio, 0.05), (class_information, 0.2), (cluster_nmi, 0.1)):
        values = [measure(*_blobs(distance)) for distance in (0.0, 3.0, 30.0)]
        assert values == sorted(values)
        assert values[0] < nothing
    assert cluster_nmi(*_blobs(30.0)) == 1.0
    assert linear_probe(*_blobs(30.0)) == 1.0
    assert linear_probe(*_blobs(0.0)) < 0.5


def test_degenerate_embeddings():
    y = torch.tensor([0, 0, 1, 1])
    assert trace_ratio(torch.ones(4, 2), y) == 0
    assert trace_ratio(y[:, None].float(), y) == float("inf")
    assert class_information(torch.ones(4, 2), y) == 0
    assert cluster_nmi(torch.ones(4, 2), y) == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(3), torch.zeros(3), "embeddings must have shape"),
        (torch.ones(3, 1), torch.zeros(2), r"classes must have shape \(3,\)"),
        (torch.ones(3, 1), torch.zeros(3), "at least two classes"),
        (torch.full((3, 1), torch.nan), torch.arange(3), "embeddings must be finite"),
    ],
)
def test_errors_name_the_argument(x, y, message):
    for measure in (trace_ratio, class_information, cluster_nmi, linear_probe):
        with pytest.raises(ValueError, match=message):
            measure(x, y)
    with pytest.raises(ValueError, match="folds must be from 2 to 50"):
        linear_probe(*_blobs(1.0), folds=51)
