"""One layer of the cache: it watches its prefill's attention, evicts, and stores what is kept."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from retain.information.linalg import gram, psd_cholesky
from retain.kv.accounting import HeadReport
from retain.kv.allocation import Protection, tokens_allowed
from retain.kv.attention import mark
from retain.kv.estimators import Leverage, capacity_factor, linear_weights
from retain.kv.named import DEFAULT_POLICY, policies
from retain.kv.policy import Policy
from retain.kv.rotary import RotaryEmbedding
from retain.kv.signals import Signals, rotate_half
from retain.kv.storage import UniformStorage


class RetainLayer(DynamicLayer):
    """One full-attention layer of a `RetainCache`."""

    is_croppable = False

    def __init__(
        self,
        policy: Policy,
        budget: float,
        protection: Protection,
        *,
        module: nn.Module,
        rotary: RotaryEmbedding | None,
        index: int,
        layer: int,
        layers: int,
        measure_capacity: bool,
    ) -> None:
        self.storage: UniformStorage | None = None
        super().__init__()
        self.policy, self.budget, self.protection = policy, budget, protection
        self.index, self.layer, self.layers = index, layer, layers
        self.measure_capacity = measure_capacity
        self._module = weakref.ref(module)
        self._rotary = rotary
        self.reset()

    # The base class assigns keys and values; here they live in the storage.
    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored keys [batch, kv_heads, width, dim]."""
        return None if self.storage is None else self.storage.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        if self.storage is not None and keys is not None:
            self.storage.keys = keys

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored values [batch, kv_heads, width, value_dim]."""
        return None if self.storage is None else self.storage.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        if self.storage is not None and values is not None:
            self.storage.values = values

    def reset(self) -> None:
        """Forget everything seen."""
        self.storage = None
        self.is_initialized = False
        self.waiting = False
        self.evicted = False
        self.seen = 0  # columns of the model's input so far, padding included
        self.appended = 0  # of these, since the prefill
        self._uneven = False  # rows of the batch keep different numbers of entries
        self._padding: Tensor | None = None  # left padding of each row, long [batch]
        self._prefill_valid: Tensor | None = None  # bool [batch, tokens], between `before` and `after`
        self._capacity: Tensor | None = None  # share retained, [batch, kv_heads]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values and return all that the attention shall see."""
        new = key_states.shape[2]
        if self.storage is None:
            # The prefill: nothing is stored before its attention has been computed.
            self.waiting = True
            self.dtype, self.device = key_states.dtype, key_states.device
            return mark(key_states, self), value_states
        assert self._padding is not None
        ahead = torch.arange(self.seen, self.seen + new, device=key_states.device)
        self.storage.append(key_states, value_states, ahead - self._padding[:, None])
        self.seen += new
        self.appended += new
        self.waiting = True
        return mark(self.storage.keys, self), self.storage.values

    def before(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """Check an attention call over this layer's keys and return the mask for it."""
        if module is not self._module():
            raise ValueError(
                f"past_key_values is a RetainCache of another model: layer {self.index} was made for a "
                "different attention module. Make a RetainCache with the model that you call"
            )
        self.waiting = False
        if self.storage is not None:
            return self._mask(mask, query)
        valid = _valid_tokens(mask, key.shape[2])
        if valid is not None and not bool(valid[:, -1].all()):
            raise ValueError(
                "attention_mask pads on the right (the last token of a row is masked); accepted: left padding. "
                "Set tokenizer.padding_side = 'left'"
            )
        if valid is not None and bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise ValueError("attention_mask masks tokens inside a prompt; accepted: left padding only")
        self._prefill_valid = valid
        return mask

    def after(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        attention: Tensor | None,
    ) -> None:
        """Evict, once the prefill's attention has been computed."""
        if self.storage is not None:
            return
        with torch.no_grad():
            projection = getattr(module, "o_proj", None)
            signals = Signals(
                query,
                key,
                value,
                valid=self._prefill_valid,
                scaling=scaling,
                layer=self.layer,
                layers=self.layers,
                output=getattr(projection, "weight", None),
                rotary=self._rotary,
                rotate=getattr(sys.modules[type(module).__module__], "rotate_half", rotate_half),
                attention=attention,
            )
            storage = self._evict(signals)
            # What was evicted and not finite has reached every later layer, where this finds it.
            total = storage.keys.sum(dtype=torch.float32) + storage.values.sum(dtype=torch.float32)
            if not bool(torch.isfinite(total)):
                raise ValueError(f"keys or values of layer {self.index} contain NaN or Inf: nothing was cached")
            self.storage = storage
        if self.layer == self.layers - 1 and self._rotary is not None:
            self._rotary.forget()
        self._prefill_valid = None
        self.seen = key.shape[2]
        self.is_initialized = True

    def _evict(self, signals: Signals) -> UniformStorage:
        seen = signals.counts.tolist()
        allowed = [tokens_allowed(self.budget, count) for count in seen]
        self._padding = signals.tokens - signals.counts
        if self.policy.keep_all or allowed == seen:
            positions = signals.positions.clamp_min(-1).to(torch.int32)[:, None]
            positions = positions.expand(-1, signals.kv_heads, -1)
            if self.measure_capacity:
                self._capacity = torch.ones(signals.batch, signals.kv_heads)
            return UniformStorage(signals.keys, signals.values, positions)
        budget = self.policy.budget(signals, allowed, self.protection)
        kept = self.policy.select(signals, budget)
        self._uneven = len(set(budget.tokens)) > 1
        self.evicted = budget.tokens != tuple(seen)
        if self.measure_capacity:
            self._capacity = capacity_share(signals, kept)
        return UniformStorage.gather(signals.keys, signals.values, kept, signals.positions)

    def _mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Fit the model's mask, made for the first full-attention layer, to this layer's entries."""
        assert self.storage is not None
        width = self.storage.width - self.appended
        if mask is None:
            if not self._uneven:
                return None
            # No row has padding among what the mask covers, yet some rows hold empty places.
            return self.storage.valid[:, None, None].expand(-1, 1, query.shape[2], -1)
        if mask.shape[-1] == self.storage.width and not self._uneven:
            return mask
        head = self.storage.valid[:, None, None, :width].expand(-1, 1, mask.shape[2], -1)
        if mask.dtype != torch.bool:
            lowest = torch.finfo(mask.dtype).min
            head = torch.zeros_like(head, dtype=mask.dtype).masked_fill_(~head, lowest)
        return torch.cat((head, mask[..., mask.shape[-1] - self.appended :]), dim=-1)

    def get_seq_length(self, *args: Any) -> int:
        """Return how many tokens were seen, padding included: the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return (length, offset) of the keys that the mask shall cover.

        Args:
            query_length: number of new tokens; transformers 5.2 passes their positions instead.

        """
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        width = 0 if self.storage is None else self.storage.width
        return width + new, self.seen - width

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; refused once entries were evicted, because they can't be put back.

        Args:
            tokens_to_remove: minus the number to forget; a positive number is the length to keep.

        """
        if self.evicted:
            raise ValueError(
                "crop of a RetainCache that has evicted entries is refused: what was evicted can't be put back. "
                "Use budget=1.0, or generate without assisted decoding"
            )
        remove = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if self.storage is None or remove <= 0:
            return
        self.storage.drop_last(remove)
        self.seen -= remove
        self.appended = max(0, self.appended - remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch, as beam search does."""
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.storage is not None:
            self._rows(torch.arange(self.storage.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.storage is not None:
            every = torch.arange(self.storage.keys.shape[0])
            self._rows(every[indices.cpu()])

    def _rows(self, index: Tensor) -> None:
        if self.storage is None:
            return
        assert self._padding is not None
        self.storage.rows(index)
        self._padding = self._padding.index_select(0, index.to(self._padding.device))
        if self._capacity is not None:
            self._capacity = self._capacity.index_select(0, index.to(self._capacity.device))

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values had nothing been evicted, padding included as transformers stores it."""
        if self.storage is None:
            return 0
        return self.storage.nbytes // self.storage.width * self.seen

    def head_reports(self) -> list[HeadReport]:
        """Return one report for each KV head."""
        assert self.storage is not None
        assert self._padding is not None
        batch, heads, _ = self.storage.positions.shape
        tokens_seen = batch * self.seen - int(self._padding.sum())
        kept = self.storage.kept.sum(0).tolist()
        shares = None if self._capacity is None else self._capacity.mean(0).tolist()
        return [
            HeadReport(
                layer=self.index,
                head=head,
                tokens_seen=tokens_seen,
                tokens_kept=kept[head],
                bytes_full=self.bytes_full // heads,
                bytes_kept=self.storage.nbytes // heads,
                capacity_retained=None if shares is None else shares[head],
            )
            for head in range(heads)
        ]


def capacity_share(signals: Signals, kept: Tensor) -> Tensor:  # long [batch, kv_heads, width]
    """Return the share of the capacity that the kept tokens carry, [batch, kv_heads].

    The objective is the default policy's, whatever chose the tokens: C(kept) / C(all) with the noise variance
    of the whole cache (2604.25975; C is its closed-form capacity).
    """
    reference = policies()[DEFAULT_POLICY]
    estimator = reference.estimator
    assert isinstance(estimator, Leverage)
    factor = capacity_factor(reference.weights, reference.directions, estimator.ridge, estimator.relative, signals)
    index = kept.clamp_min(0)
    weights = linear_weights(reference.weights, signals).gather(2, index).masked_fill(kept < 0, 0)
    vectors = reference.directions.vectors(signals)
    vectors = vectors.gather(2, index[..., None].expand(-1, -1, -1, vectors.shape[-1]))
    # In the units of the factor, as its noise is.
    vectors = vectors / factor.vector_scale[..., None, None]
    ratio = gram(vectors, weights / factor.weight_scale[..., None]) / factor.noise[..., None, None]
    identity = torch.eye(ratio.shape[-1], device=ratio.device)
    part = psd_cholesky(identity + ratio).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # A head without any capacity has nothing to lose.
    return torch.where(factor.capacity > 0, part / factor.capacity, torch.ones_like(part))


def _valid_tokens(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return which tokens a prefill's mask [batch, 1, queries, tokens] lets its last query see."""
    if mask is None:
        return None
    last = mask[:, 0, -1, :tokens]
    return last if last.dtype == torch.bool else last == 0
