import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suffice.information.alignment import class_information, cluster_nmi, linear_probe, trace_ratio


def random_classes(distance: float, seed: int = 0, items: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings of three classes with unit variance, and their classes; `distance` scales the means."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(items) % 3
    means = distance * torch.eye(3, 4)
    return means[classes] + torch.randn(items, 4, generator=generator), classes


@given(seed=st.integers(0, 1000))
def test_trace_ratio_agrees_with_scatter_matrices(seed):
    x, y = random_classes(1.0, seed)
    points, labels = x.double().numpy(), y.numpy()
    between = within = 0.0
    for label in set(labels):
        members = points[labels == label]
        shift = members.mean(0) - points.mean(0)
        between += len(members) * np.trace(np.outer(shift, shift))
        within += np.trace((len(members) - 1) * np.cov(members.T))
    assert trace_ratio(x, y) == pytest.approx(between / within)


@given(seed=st.integers(0, 1000), ridge=st.sampled_from([0.01, 0.1, 1.0]))
def test_class_information_agrees_with_its_formula(seed, ridge):
    x, y = random_classes(2.0, seed)
    covariance = np.cov(x.double().numpy().T, bias=True)
    alpha = len(covariance) / (ridge * np.trace(covariance))

    def rate(matrix):
        return np.linalg.slogdet(np.eye(4) + alpha * matrix)[1] / 2

    expected = rate(covariance) - sum(
        (y == c).double().mean().item() * rate(np.cov(x[y == c].double().numpy().T, bias=True)) for c in range(3)
    )
    assert class_information(x, y, ridge) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 200), scale=st.floats(0.01, 100))
def test_invariance_to_rotation_scale_shift_and_labels(seed, scale):
    x, y = random_classes(1.5, seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    moved = scale * (x @ rotation) + scale
    renamed = torch.tensor([7, 3, 5])[y]
    for measure in (trace_ratio, class_information):
        assert measure(moved, renamed) == pytest.approx(measure(x, y), rel=1e-3)


def test_measures_increase_with_the_distance_between_classes():
    for measure, chance in ((trace_ratio, 0.05), (class_information, 0.2), (cluster_nmi, 0.1)):
        values = [measure(*random_classes(distance)) for distance in (0.0, 3.0, 30.0)]
        assert values == sorted(values)
        assert values[0] < chance
    assert cluster_nmi(*random_classes(30.0)) == 1.0
    assert linear_probe(*random_classes(30.0)) == 1.0
    assert linear_probe(*random_classes(0.0)) < 0.5


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
        linear_probe(*random_classes(1.0), folds=51)
