"""The formulas in dense NumPy float64, one set at a time, without code of the library."""

import math
from itertools import combinations

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def numbers(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def dense_gram(vectors: Array, weights: Array) -> Array:
    total = np.zeros((vectors.shape[1], vectors.shape[1]))
    for u, w in zip(vectors, weights, strict=True):
        total += w * np.outer(u, u)
    return total


def dense_noise(vectors: Array, weights: Array, ridge: float, relative: bool) -> float:
    trace = float(np.trace(dense_gram(vectors, weights)))
    if not relative:
        return ridge
    return ridge * trace / vectors.shape[1] if trace > 0 else 1.0


def dense_capacity(vectors: Array, weights: Array, noise: float, subset: list[int] | None = None) -> float:
    chosen = list(range(len(vectors))) if subset is None else subset
    gram = dense_gram(vectors[chosen], weights[chosen])
    return 0.5 * float(np.linalg.slogdet(np.eye(len(gram)) + gram / noise)[1])


def dense_leverage(vectors: Array, weights: Array, noise: float) -> Array:
    inverse = np.linalg.inv(noise * np.eye(vectors.shape[1]) + dense_gram(vectors, weights))
    return np.array([w * u @ inverse @ u for u, w in zip(vectors, weights, strict=True)])


def best_capacity(vectors: Array, weights: Array, noise: float, budget: int) -> float:
    return max(dense_capacity(vectors, weights, noise, list(s)) for s in combinations(range(len(vectors)), budget))


def dense_greedy(vectors: Array, weights: Array, noise: float, budget: int, start: list[int]) -> list[int]:
    chosen = list(start)
    while len(chosen) < budget:
        rest = [i for i in range(len(vectors)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: dense_capacity(vectors, weights, noise, [*chosen, i])))
    return sorted(chosen)


def draw_set(
    seed: int, *leading: int, n: int, d: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:  # [*leading, n, d], [*leading, n]
    """Return normal vectors and weights that span four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(*leading, n, d, generator=generator, dtype=torch.float64)
    weights = (math.log(10) * (4 * torch.rand(*leading, n, generator=generator, dtype=torch.float64) - 2)).exp()
    return vectors.to(dtype), weights.to(dtype)


seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 9)
ridges = st.floats(1e-3, 1e2)
