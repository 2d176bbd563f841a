"""Rotary position embeddings: rotate the keys and queries of a layer to any positions, and back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Frequencies:
    """The frequencies of a model's rotary embedding, in radians per position.

    Args:
        module: the module that owns the frequencies.
        name: name of its buffer with one frequency for each rotary pair, [pairs]: `inv_freq`, or
            `<layer type>_inv_freq` if layers of different types have different frequencies.

    Attributes:
        depends_on_length: whether the frequencies change with the largest position (dynamic NTK, LongRoPE).

    """

    def __init__(self, module: Any, name: str = "inv_freq") -> None:
        self._module, self._name = module, name
        self._layer_type: str | None = name.removesuffix("inv_freq").removesuffix("_") or None
        rope_type: Any = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict):
            rope_type = rope_type.get(self._layer_type)  # pyright: ignore[reportUnknownMemberType]
        self.depends_on_length = rope_type is not None and ("dynamic" in rope_type or rope_type == "longrope")

    def __len__(self) -> int:
        return len(getattr(self._module, self._name))

    def values(self, positions: Tensor) -> Tensor:
        """Return the frequencies in a text that ends at the largest of these positions, float32 [pairs]."""
        module = self._module
        if self.depends_on_length:
            # The module changes its frequencies in place when it is called: call a copy.
            module = copy.deepcopy(module)
            last = positions.amax().reshape(1, 1)
            empty = torch.empty(0, dtype=torch.float32, device=positions.device)
            module(empty, last) if self._layer_type is None else module(empty, last, self._layer_type)
        # The module may be on another device than the layer if the model is spread over several devices.
        return getattr(module, self._name).to(positions.device, torch.float32)


class RotaryEmbedding:
    """Rotates pairs of dimensions of keys and queries by angles that grow with the position.

    The pair (x_a, x_b) at position p becomes (x_a cos pθ − x_b sin pθ, x_b cos pθ + x_a sin pθ).

    All layers ask for the same positions during a prefill, so the last cosines and sines are cached.

    Args:
        frequencies: the frequency θ of each pair.
        first: the dimensions a of the pairs.
        second: the dimensions b, in the same order. `first` and `second` together cover a contiguous range of
            dimensions; the others are not rotated.
        key_scale: factors by which the model multiplies the dimensions of rotated keys, [head_dim], for example the
            weight of a norm after the rotary embedding; None if there are none.
        rotates_queries: whether queries are rotated as well, without factors.

    Attributes:
        start: the first rotated dimension.
        stop: the dimension after the last rotated one.

    """

    def __init__(
        self,
        frequencies: Frequencies,
        first: slice,
        second: slice,
        *,
        key_scale: Tensor | None = None,
        rotates_queries: bool = True,
    ) -> None:
        self.frequencies, self.first, self.second = frequencies, first, second
        self.key_scale, self.rotates_queries = key_scale, rotates_queries
        self.start = min(first.start, second.start)
        self.stop = self.start + 2 * len(frequencies)
        # The last positions of each shape, with their cosines and sines.
        self._last: dict[torch.Size, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    @classmethod
    def half_split(cls, frequencies: Frequencies) -> RotaryEmbedding:
        """Return an embedding that pairs dimension j with j + number of pairs, as Llama does."""
        pairs = len(frequencies)
        return cls(frequencies, slice(0, pairs), slice(pairs, 2 * pairs))

    def with_factors(self, key_scale: Tensor) -> RotaryEmbedding:
        """Return a copy that multiplies rotated keys by factors; see `key_scale`."""
        return RotaryEmbedding(self.frequencies, self.first, self.second, key_scale=key_scale)

    def without_queries(self) -> RotaryEmbedding:
        """Return a copy that does not rotate queries."""
        return RotaryEmbedding(
            self.frequencies, self.first, self.second, key_scale=self.key_scale, rotates_queries=False
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryEmbedding:
        return self

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors by the angles of positions.

        Args:
            x: [batch, heads, entries, head_dim].
            positions: positions or differences of positions, long [batch, 1 or heads, entries].

        Returns:
            Float32, shaped like `x`.

        """
        cos, sin = self._cos_sin(positions)
        # Normalized, so that many rotations in a row do not change the norm.
        scale = (cos * cos + sin * sin).sqrt()
        rotated, quarter_turn = self._rotated_part(x)
        return self._with_rest(rotated * (cos / scale) + quarter_turn * (sin / scale), x)

    def rotate_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors at positions back to position 0; see `rotate`."""
        cos, sin = self._cos_sin(positions)
        scale = cos * cos + sin * sin
        rotated, quarter_turn = self._rotated_part(x)
        return self._with_rest((rotated * (cos / scale)).addcmul_(quarter_turn, sin / scale, value=-1), x)

    def rotate_keys(self, keys: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Rotate keys of the model, which may have factors; see `rotate` and `rotate_back`."""
        rotate = self.rotate_back if back else self.rotate
        if self.key_scale is None:
            return rotate(keys, positions)
        scale = self.key_scale.to(keys.device)
        return rotate(keys.float() / scale, positions) * scale

    def mean_rotation(self, positions: Tensor, head_dim: int) -> Tensor:
        """Return the mean of the rotation matrices of positions [batch, n], float32 [batch, head_dim, head_dim]."""
        cos, sin = (x.mean(1) for x in self._cos_sin(positions))
        dimensions = torch.arange(head_dim, device=positions.device)
        first, second = dimensions[self.first], dimensions[self.second]
        rotation = torch.eye(head_dim, device=positions.device).repeat(len(positions), 1, 1)
        rotation[:, dimensions[self.start : self.stop], dimensions[self.start : self.stop]] = cos
        rotation[:, first, second] = -sin[:, first - self.start]
        rotation[:, second, first] = sin[:, first - self.start]
        return rotation

    def clear_cache(self) -> None:
        """Free the cached results."""
        self._last.clear()

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine and sine of each rotated dimension, float32 [*positions.shape, 2 pairs]."""
        last = self._last.get(positions.shape)
        if last is not None and last[0].device == positions.device and torch.equal(last[0], positions):
            return last[1]
        frequencies = self.frequencies.values(positions)
        of_dimension = frequencies.new_empty(self.stop)
        of_dimension[self.first] = of_dimension[self.second] = frequencies
        angles = positions[..., None].float() * of_dimension[self.start :]
        result = (angles.cos(), angles.sin())
        self._last[positions.shape] = (positions, result)
        return result

    def _rotated_part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotated dimensions of x as float32, and the same dimensions after a rotation by 90 degrees."""
        x = x.float()
        turned = torch.empty_like(x)
        turned[..., self.first], turned[..., self.second] = -x[..., self.second], x[..., self.first]
        return x[..., self.start : self.stop], turned[..., self.start : self.stop]

    def _with_rest(self, rotated: Tensor, x: Tensor) -> Tensor:
        """Return rotated dimensions together with the dimensions of x that are not rotated."""
        if rotated.shape[-1] == x.shape[-1]:
            return rotated
        return torch.cat((x[..., : self.start].float(), rotated, x[..., self.stop :].float()), dim=-1)
