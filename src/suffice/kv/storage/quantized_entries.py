"""Quantized entries of heads of any length, one head after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from suffice.information.linalg import without_autocast
from suffice.kv.backend.triton_backend import choose_backend
from suffice.kv.storage.base import LOGIT_BIAS, Entries, flat_index, index_vectors, last_slots
from suffice.kv.storage.error_feedback import ErrorFeedback
from suffice.kv.storage.vector_format import QuantizedVectors, VectorFormat


@dataclass(frozen=True)
class QuantizedEntries:
    """Quantized entries of all rows and heads, one head after the other. The tensors are never changed.

    Before the keys of a head are quantized, its mean key μ is subtracted, and each dimension i is multiplied by a scale
    t_i: the key k is stored as (k − μ) t, rotated. Queries are divided by t. The error of a logit is the sum of the
    products of a query's numbers with the errors of the key; it is smallest for t_i = √(size of the queries' numbers /
    size of the keys' numbers), because quantization gives all stored dimensions the same error. This matters for models
    some of whose dimensions have large keys and small queries. Mean and scales are computed from the first entries of
    the head that are quantized, and stay the same for later entries. Keys are rounded with `ErrorFeedback`.

    Args:
        key_format: how keys are quantized.
        value_format: how values are quantized.
        keys: quantized keys without the mean.
        values: quantized values.
        positions: index of each entry within the text of its row, int32 [entries].
        lengths: number of entries of each row and head.
        means: mean key of each row and head, in the model's dtype, [batch, num_key_value_heads, head_dim].
        scales: scale t of each dimension, shaped and typed like `means`; for heads without quantized entries so far,
            the size of the numbers of their queries.
        error_sums: sums over all entries that were ever quantized, float32 [4, batch, num_key_value_heads]: squared
            errors of the stored keys, their squared lengths, and the same of the values.
        columns: additional numbers of each entry by name, float32 [entries].

    """

    key_format: VectorFormat
    value_format: VectorFormat
    keys: QuantizedVectors
    values: QuantizedVectors
    positions: Tensor
    lengths: list[list[int]]
    means: Tensor
    scales: Tensor
    error_sums: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def empty(cls, entries: Entries, bits: tuple[int, int], query_sizes: Tensor | None = None) -> QuantizedEntries:
        """Return no entries.

        Args:
            entries: entries with the number of rows and heads, the dimensions, the dtype and the columns.
            bits: number of bits of keys and of values.
            query_sizes: root mean square of each dimension of the queries of each head, [batch, num_key_value_heads,
                head_dim]; None if all have about the same size. Heads with sizes that are not finite get equal sizes.

        """
        batch, heads, _, head_dim = entries.keys.shape
        device = entries.keys.device
        key_format, value_format = VectorFormat(head_dim, bits[0]), VectorFormat(entries.values.shape[-1], bits[1])
        means = entries.keys.new_zeros(batch, heads, head_dim)
        return cls(
            key_format,
            value_format,
            key_format.empty(device),
            value_format.empty(device),
            torch.empty(0, dtype=torch.int32, device=device),
            [[0] * heads for _ in range(batch)],
            means,
            torch.ones_like(means) if query_sizes is None else _as_finite(query_sizes, means.dtype),
            torch.zeros(4, batch, heads, dtype=torch.float32, device=device),
            {name: torch.empty(0, dtype=torch.float32, device=device) for name in entries.columns},
        )

    @property
    def logit_bias(self) -> Tensor | None:
        """Numbers that are added to the logits, float32 [entries]; None if there are none."""
        return self.columns.get(LOGIT_BIAS)

    @property
    def counts(self) -> Tensor:
        """Number of entries of each row and head, long [batch, num_key_value_heads] on the CPU."""
        return torch.tensor(self.lengths)

    @property
    def width(self) -> int:
        """Number of entries of the row and head with the most entries."""
        return max(itertools.chain(*self.lengths))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold keys and values."""
        return self.keys.codes, self.keys.scales, self.values.codes, self.values.scales, self.means, self.scales

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one quantized key and value."""
        return self.key_format.bytes_per_vector + self.value_format.bytes_per_vector

    @property
    def nbytes_index(self) -> int:
        """Bytes of positions, columns and sums of errors."""
        return sum(x.nbytes for x in (self.positions, self.error_sums, *self.columns.values()))

    @property
    def relative_errors(self) -> list[tuple[float, float] | None]:
        """Relative error of keys and of values of each head, over all rows; None if no entry was ever quantized."""
        sums = self.error_sums.sum(1)
        key_error, key_size, value_error, value_size = sums
        # Vectors of zeros are stored with errors of about 2^−41, which are not relative to anything.
        keys, values = (
            torch.where(size > 0, error / size, size).sqrt().tolist()
            for error, size in ((key_error, key_size), (value_error, value_size))
        )
        was_quantized = sums.any(0).tolist()
        return [(key, value) if known else None for known, key, value in zip(was_quantized, keys, values, strict=True)]

    def append(self, entries: Entries, index: Tensor, query_moments: Tensor | None = None) -> QuantizedEntries:
        """Return these entries and more, which are quantized.

        Args:
            entries: entries in the model's dtype.
            index: indices of the entries to quantize, long [batch, num_key_value_heads, width]; −1 for none.
            query_moments: second moments of the queries (see `QuantizedStorage.gather`), with which keys are rounded
                with feedback (`ErrorFeedback`). None to round each number to the nearest integer.

        Raises:
            ValueError: a key or value is NaN, infinite, or too large for the scales.

        """
        slots = (index >= 0).flatten().nonzero().squeeze(-1)
        new_counts = (index >= 0).sum(-1).cpu()
        if not len(slots):
            return self
        device = index.device

        def select(x: Tensor) -> Tensor:
            return x.expand(-1, index.shape[1], -1).gather(2, index.clamp_min(0)).flatten().index_select(0, slots)

        keys, values = (
            index_vectors(x, flat_index(x, index.clamp_min(0)).flatten().index_select(0, slots))
            for x in (entries.keys, entries.values)
        )
        heads = _Heads(new_counts, device)
        means, scales, keys = self._standardize(keys, heads, new_counts)
        backend = choose_backend(keys, values)
        with without_autocast(device):
            feedback = None if query_moments is None else self._feedback(query_moments, scales, new_counts)
            (new_keys, key_error), (new_values, value_error) = (
                backend.quantize(keys, self.key_format, feedback),
                backend.quantize(values, self.value_format),
            )
        sums = self._sums_by_head((key_error, keys, value_error, values), heads)
        # The scales of heads without entries are not used yet. They are 0 for rows that consist of padding so far.
        is_used = (self.counts + new_counts > 0).to(device)[..., None]
        is_valid = (scales.isfinite() & (scales > 0)) | ~is_used
        if not bool(sums.isfinite().all() & is_valid.all()):
            raise ValueError(
                "keys and values must be finite and below 1e7, got larger, infinite or NaN numbers: "
                "nothing was quantized"
            )
        merge = _Merge(self.counts, new_counts, device)
        return replace(
            self,
            keys=QuantizedVectors(merge(self.keys.codes, new_keys.codes), merge(self.keys.scales, new_keys.scales)),
            values=QuantizedVectors(
                merge(self.values.codes, new_values.codes), merge(self.values.scales, new_values.scales)
            ),
            positions=merge(self.positions, select(entries.positions).to(torch.int32)),
            lengths=(self.counts + new_counts).tolist(),
            means=means,
            scales=scales,
            error_sums=self.error_sums + sums,
            columns={name: merge(x, select(entries.columns[name])) for name, x in self.columns.items()},
        )

    def _feedback(self, query_moments: Tensor, scales: Tensor, counts: Tensor) -> ErrorFeedback:
        rotation = self.key_format.rotation(query_moments)
        return ErrorFeedback.from_moments(
            query_moments.flatten(0, 1), scales.flatten(0, 1), rotation, counts.flatten().tolist()
        )

    def _standardize(self, keys: Tensor, heads: _Heads, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean keys and scales, which are computed for the heads that have no entries yet, and scaled keys.

        Float32 keys are changed in place.
        """
        is_new = ((self.counts == 0) & (counts > 0)).to(keys.device)[..., None]
        has_new, keys = bool(is_new.any()), keys.float()
        means, scales = self.means, self.scales
        if has_new:
            means = torch.where(is_new, heads.mean(keys).view(means.shape).to(means.dtype), means)
        centered = heads.apply_(Tensor.sub_, keys, means.float().flatten(0, 1))
        if has_new:
            key_sizes = _without_small_sizes(heads.mean_square(centered).view(means.shape).sqrt())
            query_sizes = _without_small_sizes(self.scales.float())
            scales = torch.where(is_new, _cast((query_sizes / key_sizes).sqrt(), scales.dtype), scales)
        return means, scales, heads.apply_(Tensor.mul_, centered, scales.float().flatten(0, 1))

    def _sums_by_head(self, parts: tuple[Tensor, Tensor, Tensor, Tensor], heads: _Heads) -> Tensor:
        """Return sums by head, float32 [4, batch, num_key_value_heads]; of vectors, sums of squared lengths."""
        sums = [
            heads.sum(part if part.dim() == 1 else torch.linalg.vector_norm(part.float(), dim=-1).square())
            for part in parts
        ]
        return torch.stack(sums).view(4, *self.means.shape[:2])

    def keep(self, mask: Tensor) -> QuantizedEntries:
        """Return the entries for which a mask is True, bool [entries]."""
        heads = mask.split(list(itertools.chain(*self.lengths)))
        counts = torch.stack([part.sum() for part in heads]).view(self.counts.shape)
        index = mask.nonzero().squeeze(-1)
        return self._index(index, counts.tolist())

    def select_rows(self, rows: list[int]) -> QuantizedEntries:
        """Return rows of the batch: the new row j is the old row rows[j]."""
        ends = list(itertools.accumulate(map(sum, self.lengths)))
        device = self.positions.device
        parts = [torch.arange(ends[row] - sum(self.lengths[row]), ends[row], device=device) for row in rows]
        index = torch.tensor(rows, device=device)
        selected = self._index(torch.cat(parts), [list(self.lengths[row]) for row in rows])
        means, scales = self.means.index_select(0, index), self.scales.index_select(0, index)
        return replace(selected, means=means, scales=scales, error_sums=self.error_sums.index_select(1, index))

    def _index(self, index: Tensor, lengths: list[list[int]]) -> QuantizedEntries:
        def select(x: Tensor) -> Tensor:
            return x.index_select(0, index)

        return replace(
            self,
            keys=self.keys.map(select),
            values=self.values.map(select),
            positions=select(self.positions),
            lengths=lengths,
            columns={name: select(x) for name, x in self.columns.items()},
        )

    def decode_keys(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return rotated and scaled keys without the mean, [entries, padded dim]."""
        return self.key_format.dequantize(self.keys.map(lambda x: x[part]), dtype)

    def decode_values(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return rotated values, [entries, padded dim]."""
        return self.value_format.dequantize(self.values.map(lambda x: x[part]), dtype)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Return keys [entries, head_dim] and values [entries, value_dim], in the model's dtype."""
        dtype = torch.promote_types(self.means.dtype, torch.float32)
        everything = slice(None)
        keys = self._rotate_back(self.decode_keys(everything, dtype), self.key_format)
        values = self._rotate_back(self.decode_values(everything, dtype), self.value_format)
        heads = _Heads(self.counts, keys.device)
        heads.apply_(Tensor.div_, keys, self.scales.to(dtype).flatten(0, 1))
        heads.apply_(Tensor.add_, keys, self.means.to(dtype).flatten(0, 1))
        return keys.to(self.means.dtype), values.to(self.means.dtype)

    @staticmethod
    def _rotate_back(vectors: Tensor, format_: VectorFormat) -> Tensor:
        return vectors @ format_.rotation(vectors).mT

    def align(self, x: Tensor, fill: float) -> Tensor:
        """Return one item per entry, [entries, …], right-aligned by head: [batch, num_key_value_heads, width, …]."""
        counts = self.counts
        slots = last_slots(counts.flatten(), self.width, x.device)
        aligned = x.new_full((counts.numel() * self.width, *x.shape[1:]), fill).index_copy_(0, slots, x)
        return aligned.unflatten(0, (*counts.shape, self.width))

    def pack(self, aligned: Tensor) -> Tensor:
        """Return the inverse of `align`: [entries, …] from [batch, num_key_value_heads, width, …]."""
        slots = last_slots(self.counts.flatten(), self.width, aligned.device)
        return aligned.flatten(0, 2).index_select(0, slots)


class _Heads:
    """Computes with vectors that are sorted by head.

    On the CPU, each head is computed on its own; elsewhere, all are computed with a few operations.

    Args:
        counts: number of vectors of each head, on the CPU.
        device: device of the vectors.

    """

    def __init__(self, counts: Tensor, device: torch.device) -> None:
        counts = counts.flatten()
        self._counts: list[int] = counts.tolist()
        self._on_cpu = device.type == "cpu"
        if not self._on_cpu:  # the head of each vector, long [vectors]
            heads = torch.arange(len(counts), device=device)
            self._index = heads.repeat_interleave(counts.to(device), output_size=sum(self._counts))

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of the items of each head, [heads, …]."""
        if self._on_cpu:
            return torch.stack([part.sum(0) for part in x.split(self._counts)])
        return x.new_zeros(len(self._counts), *x.shape[1:]).index_add_(0, self._index, x)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of the vectors of each head, [heads, dim]; zeros for heads without vectors."""
        counts = torch.tensor(self._counts, device=x.device).clamp_min(1)
        return self.sum(x) / counts[:, None]

    def mean_square(self, x: Tensor) -> Tensor:
        """Return the mean of the squares of each dimension, [heads, dim]; zeros for heads without vectors."""
        return self.mean(x.square())

    def apply_(self, operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Apply an operation in place, such as `Tensor.mul_`, to each vector of x and the head's vector of y."""
        if not self._on_cpu:
            return operation(x, y.index_select(0, self._index))
        for part, vector in zip(x.split(self._counts), y, strict=True):
            operation(part, vector)
        return x


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return finite numbers in a dtype; those above its largest number become that number."""
    return x.clamp(max=min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)).to(dtype)


def _as_finite(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sizes of dimensions, [..., dim], in a dtype; ones for heads some of whose sizes are infinite or NaN."""
    return _cast(torch.where(sizes.isfinite().all(-1, keepdim=True), sizes, torch.ones_like(sizes)), dtype)


def _without_small_sizes(sizes: Tensor) -> Tensor:
    """Replace sizes of dimensions, [..., dim], that are below a tenth of the head's root mean square."""
    floor = sizes.square().mean(-1, keepdim=True).sqrt() / 10
    sizes = torch.maximum(sizes, floor)
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


class _Merge:
    """Joins items of two sets of entries, both sorted by head, so that the result is sorted by head.

    Args:
        first_counts: number of entries of each head in the first set, on the CPU.
        second_counts: number of entries of each head in the second set, on the CPU.
        device: device of the entries.

    """

    def __init__(self, first_counts: Tensor, second_counts: Tensor, device: torch.device) -> None:
        first, second = first_counts.flatten(), second_counts.flatten()
        shift_of_first = (second.cumsum(0) - second).repeat_interleave(first)
        shift_of_second = first.cumsum(0).repeat_interleave(second)
        self._first = (torch.arange(len(shift_of_first)) + shift_of_first).to(device)
        self._second = (torch.arange(len(shift_of_second)) + shift_of_second).to(device)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        if not len(first):
            return second
        joined = first.new_empty(len(first) + len(second), *first.shape[1:])
        return joined.index_copy_(0, self._first, first).index_copy_(0, self._second, second)
