"""Run every family of models through the checks of the compressed cache, and print what fails.

    python -m tests.kv.family_checks                       # all families (about 10 minutes), a summary by error
    python -m tests.kv.family_checks llama gemma2 -v       # some families, with the traceback of each failure
    python -m tests.kv.family_checks --json out/families.json

Each check compares the compressed cache with the model's own cache. The checks are the functions of `CHECKS`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from suffice.kv import CompressedCache
from tests.kv.families import VOCABULARY, build, families

LENGTH = 40  # tokens of the prompt
NEW = 6  # tokens that are generated
CHUNK = 16
BUDGET = 0.5
TOLERANCE = 2e-3  # relative to the largest logit


class WrongResultError(AssertionError):
    """The compressed cache gave another result than the model's own cache."""


# ---- Models and inputs -----------------------------------------------------------------------------------------------


@dataclass
class EncoderOutput(ModelOutput):
    """What decoders read from an encoder."""

    last_hidden_state: Tensor | None = None
    hidden_states: Any = None
    attentions: Any = None
    attention_mask: Any = None
    router_logits: Any = None


@dataclass
class Case:
    """A model of one family and its inputs."""

    family: str
    model: PreTrainedModel = field(repr=False)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """Tokens without a special meaning, long [any]."""
        special = set(_token_ids(self.model.config.to_dict()))
        vocabulary = getattr(self.model.config.get_text_config(decoder=True), "vocab_size", VOCABULARY)
        return torch.tensor([token for token in range(3, min(vocabulary, VOCABULARY)) if token not in special])

    def prompt(self, length: int = LENGTH, seed: int = 0) -> Tensor:
        """Return random tokens, long [1, length]; no token occurs twice."""
        generator = torch.Generator().manual_seed(1000 * seed + length)
        return self.tokens[torch.randperm(len(self.tokens), generator=generator)[:length]][None]

    def other_inputs(self, rows: int = 1) -> dict[str, Any]:
        """Return the inputs besides the tokens of the text."""
        if not self.is_encoder_decoder:
            return {}
        states = torch.randn(1, 24, _hidden_size(self.model), generator=torch.Generator().manual_seed(1))
        return {"encoder_outputs": EncoderOutput(last_hidden_state=states.expand(rows, -1, -1))}

    def text_inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return tokens and their mask under the names of the model."""
        if self.is_encoder_decoder:
            return {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return {"input_ids": ids, "attention_mask": mask}

    def generate(self, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> tuple[Tensor, Tensor]:
        """Return `NEW` greedily generated tokens, [rows, new], and their logits, [rows, new, vocabulary]."""
        mask = torch.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            out = self.model.generate(
                **self.text_inputs(ids, mask),
                **self.other_inputs(len(ids)),
                **({"decoder_start_token_id": 1} if self.is_encoder_decoder else {}),
                past_key_values=cache,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                use_cache=True,
            )
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)

    def forward(self, ids: Tensor, cache: Any) -> Any:
        """Continue from a cache with more tokens; return the output of the model."""
        inputs = {"decoder_input_ids" if self.is_encoder_decoder else "input_ids": ids}
        with torch.no_grad():
            out = self.model(**inputs, **self.other_inputs(len(ids)), past_key_values=cache, use_cache=True)
        if cache is None and getattr(out, "past_key_values", None) is None:
            # The model returns no cache of its own, but may fill one that it gets.
            cache = DynamicCache(config=self.model.config)
            return self.forward(ids, cache)
        if cache is not None:
            out["past_key_values"] = cache
        return out


def _token_ids(config: dict[str, Any]) -> Iterator[int]:
    """Yield all tokens that a configuration gives a meaning."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif str(name).endswith(("_id", "_index", "_ids")) and value is not None:
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _hidden_size(model: PreTrainedModel) -> int:
    """Return the width of the encoder's output."""
    config = model.config
    encoder = next((getattr(config, name) for name in ("encoder", "encoder_config") if hasattr(config, name)), config)
    encoder = encoder if not hasattr(encoder, "text_config") else encoder.text_config
    return getattr(encoder, "d_model", None) or encoder.hidden_size


@functools.lru_cache(maxsize=1)
def case(family: str, window: int | None = None) -> Case:
    """Return the case of a family."""
    return Case(family, build(family) if window is None else build(family, window=window))


# ---- The oracle: the model's own cache and attention, with the evicted entries masked --------------------------------

# Kept positions before the call, [batch, num_key_value_heads, any], by the id of the attention module.
_kept: dict[int, Tensor] = {}
_kept_of_keys: dict[int, Tensor] = {}  # the same by the address of the keys, for layers that read keys of other layers


@contextlib.contextmanager
def masked_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's own attention read only the entries in `_kept` and the new tokens."""
    decoder = model.get_decoder()
    selected = decoder.config._attn_implementation
    name = f"masked_{selected}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(_masked_attention, selected))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[selected])
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        _kept.clear()
        _kept_of_keys.clear()
        decoder.set_attn_implementation(selected)


def _masked_attention(
    implementation: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    kept = _kept.get(id(module), _kept_of_keys.get(key.data_ptr()))
    new, total = query.shape[2], key.shape[2]
    if kept is not None and total > new:
        _kept_of_keys[key.data_ptr()] = kept
        readable = torch.zeros(*kept.shape[:2], total + 1, dtype=torch.bool)
        readable.scatter_(2, kept.long().clamp_min(-1) % (total + 1), True)
        readable = torch.cat((readable[..., : total - new], torch.ones(*kept.shape[:2], new, dtype=torch.bool)), -1)
        readable = readable.repeat_interleave(query.shape[1] // kept.shape[1], 1)[:, :, None]
        if attention_mask is None:
            readable = readable & torch.ones(new, total, dtype=torch.bool).tril(total - new)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = attention_mask[..., :total] & readable
        else:
            bias = torch.zeros(readable.shape).masked_fill_(~readable, torch.finfo(torch.float32).min / 4)
            attention_mask = bias if attention_mask is None else attention_mask[..., :total] + bias
    if implementation == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, query, key, value, attention_mask, **options)


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.abs().max())
    error = float((got - expected).abs().max()) / max(scale, 1e-6)
    if not error <= TOLERANCE:
        raise WrongResultError(f"{what} differ from the oracle (relative error {error:.1e})")


def _chunks(ids: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(ids.split(sizes, 1))


def _kept_by_module(cache: CompressedCache) -> dict[int, Tensor]:
    return {id(layer._module()): layer.storage.positions.clone() for layer in cache.compressed_layers if layer.storage}


def _compare_with_oracle(case: Case, sizes: list[int], **options: Any) -> CompressedCache:
    """Feed tokens in pieces to the compressed cache and to the oracle, and compare the logits of every piece."""
    pieces = _chunks(case.prompt(sum(sizes)), sizes)
    cache = CompressedCache(case.model, **options)
    logits, kept = [], []
    for piece in pieces:
        kept.append(_kept_by_module(cache))
        logits.append(case.forward(piece, cache).logits)
    with masked_attention(case.model):
        stock = None
        for number, piece in enumerate(pieces):
            _kept_of_keys.clear()
            _kept.update(kept[number])
            out = case.forward(piece, stock)
            stock = out.past_key_values
            _close(logits[number], out.logits, f"logits of call {number}")
    return cache


def check_construction(case: Case) -> None:
    """A cache can be made."""
    CompressedCache(case.model, budget=BUDGET)


def check_full_budget(case: Case) -> None:
    """With the full budget, generated tokens and logits equal those of the model's own cache."""
    ids = case.prompt()
    tokens, logits = case.generate(ids)
    for policy in ("capkv-profile", "capkv"):
        got, own = case.generate(ids, cache=CompressedCache(case.model, policy, 1.0))
        if not torch.equal(got, tokens):
            raise WrongResultError(f"{policy}: tokens differ from those of the stock cache")
        _close(own, logits, f"{policy}: logits")


def _check_half_budget(case: Case, policy: str) -> None:
    cache = CompressedCache(case.model, policy, BUDGET)
    case.forward(case.prompt(), cache)
    heads = cache.report().heads
    total, expected = sum(head.tokens_kept for head in heads), round(BUDGET * LENGTH) * len(heads)
    if total != expected:
        raise WrongResultError(f"{total} entries are kept instead of {expected}")
    if not cache.policy.allocation.per_head and len({head.tokens_kept for head in heads}) > 1:
        raise WrongResultError("heads keep different numbers of entries")
    del cache
    _compare_with_oracle(case, [LENGTH, 1, 1, 3, 1], policy=policy, budget=BUDGET)
    case.generate(case.prompt(), cache=CompressedCache(case.model, policy, BUDGET))


def check_half_budget(case: Case) -> None:
    """With half the budget and the default policy, counts are exact, and logits equal those of the oracle."""
    _check_half_budget(case, "capkv-profile")


def check_equal_heads(case: Case) -> None:
    """The same with the policy `capkv`, whose heads keep the same number of entries."""
    _check_half_budget(case, "capkv")


def check_always(case: Case) -> None:
    """With `evict="always"`, chunks and generated tokens are evicted, and logits equal those of the oracle."""
    sizes = [CHUNK, CHUNK, LENGTH - 2 * CHUNK, *[1] * 8]
    for policy in ("capkv-profile", "capkv"):
        cache = _compare_with_oracle(case, sizes, policy=policy, budget=20, evict="always", interval=4)
        heads = cache.report().heads
        total = sum(head.tokens_kept for head in heads)
        if not 20 * len(heads) <= total < 24 * len(heads):
            raise WrongResultError(f"{policy}: {total / len(heads)} entries are kept in each head instead of 20 to 23")
        del cache


def check_untouched(case: Case) -> None:
    """Layers that are not compressed hold the same state as in the model's own cache."""
    cache = CompressedCache(case.model, budget=BUDGET)
    case.forward(case.prompt(), cache)
    compressed = {layer.index for layer in cache.compressed_layers}
    states = {index: _states(layer) for index, layer in enumerate(cache.layers) if index not in compressed}
    del cache
    stock = case.forward(case.prompt(), None).past_key_values
    for index, state in states.items():
        expected = _states(stock.layers[index])
        if set(state) != set(expected):
            raise WrongResultError(f"layer {index} holds {sorted(state)} instead of {sorted(expected)}")
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape:
                raise WrongResultError(f"{name} of layer {index} has shape {list(tensor.shape)}")
            _close(tensor, expected[name], f"{name} of layer {index}")


def _states(layer: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        parts = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}{key}": part for key, part in parts.items() if isinstance(part, Tensor) and part.numel()}
    return {name: part.float() for name, part in found.items()}


def check_padding(case: Case) -> None:
    """Rows of a left-padded batch equal single runs, where they do with the model's own cache."""
    prompts = [case.prompt(30, seed=1), case.prompt(LENGTH, seed=2)]
    ids, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for row, own in enumerate(prompts):
        ids[row, -own.shape[1] :], mask[row, -own.shape[1] :] = own[0], 1
    if not _stock_rows_are_independent(case, ids, mask, prompts):
        return
    for policy in ("capkv-profile", "capkv"):
        tokens, logits = case.generate(ids, mask, CompressedCache(case.model, policy, BUDGET))
        for row, own in enumerate(prompts):
            got, single = case.generate(own, cache=CompressedCache(case.model, policy, BUDGET))
            if not torch.equal(got[0], tokens[row]):
                raise WrongResultError(f"{policy}: tokens of row {row} differ from the single run")
            _close(logits[row], single[0], f"{policy}: logits of row {row}")


def _stock_rows_are_independent(case: Case, ids: Tensor, mask: Tensor, prompts: list[Tensor]) -> bool:
    """Return whether rows of a padded batch have the same logits and the same keys as alone, with the stock cache.

    Some models do not count positions without padding: their logits are the same, but their keys are rotated.
    """
    cache = None if case.is_encoder_decoder else DynamicCache(config=case.model.config)
    _, together = case.generate(ids, mask, cache)
    for row, own in enumerate(prompts):
        single = None if cache is None else DynamicCache(config=case.model.config)
        _, alone = case.generate(own, cache=single)
        pairs = [(together[row], alone[0])]
        if cache is not None and single is not None:
            pairs += [
                (layer.keys[row, :, -own.shape[1] :], other.keys[0, :, -own.shape[1] :])
                for layer, other in zip(cache.layers, single.layers, strict=True)
                if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.shape[2] >= own.shape[1]
            ]
        if any(float((a - b).abs().max()) > TOLERANCE * float(b.abs().max()) for a, b in pairs):
            return False
    return True


CHECKS: dict[str, Callable[[Case], None]] = {
    "construction": check_construction,
    "full": check_full_budget,
    "half": check_half_budget,
    "equal": check_equal_heads,
    "always": check_always,
    "untouched": check_untouched,
    "padding": check_padding,
}

# ---- Runner ----------------------------------------------------------------------------------------------------------


def run_check(name: str, family: str) -> dict[str, str]:
    """Return the status of a check: `passed`, `wrong` (another result), `failed` (an error), `stock` (the model itself
    fails with its own cache), or `not built`, with the message."""
    try:
        one = case(family)
    except Exception as error:
        return {"status": "not built", "error": _message(error)}
    try:
        if name != "construction" and (error := _stock_error(family)) is not None:
            return {"status": "stock", "error": error}
        CHECKS[name](one)
    except WrongResultError as error:
        return {"status": "wrong", "error": str(error)}
    except Exception as error:
        return {"status": "failed", "error": _message(error), "traceback": traceback.format_exc()}
    return {"status": "passed", "error": ""}


@functools.lru_cache(maxsize=1)
def _stock_error(family: str) -> str | None:
    """Return the error of the model with its own cache; None if it runs."""
    try:
        one = case(family)
        ids, cache = one.prompt(), None
        for piece in _chunks(ids, [LENGTH - 8, 4, 4]):
            out = one.forward(piece, cache)
            cache = getattr(out, "past_key_values", None)
        if _seq_length(cache) == 0:
            return "the model fills no cache of keys and values"
        one.generate(ids)
    except Exception as error:
        return _message(error)
    return None


def _seq_length(cache: Any) -> int:
    """Return the number of tokens in a cache; 0 if it holds no keys and values."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, NotImplementedError):
        return 0


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all if none is given")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--json", type=Path, help="write the results to this file, added to those that it holds")
    parser.add_argument("-v", "--verbose", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    matrix: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        matrix = json.loads(options.json.read_text())
    ran = options.families or families()
    for family in ran:
        start = time.time()
        matrix[family] = {}
        for name in options.checks:
            with _time_limit(120):
                matrix[family][name] = run_check(name, family)
        for name, result in matrix[family].items():
            if options.verbose and "traceback" in result:
                print(name, result["traceback"], file=sys.stderr)
        states = " ".join(f"{name}:{result['status']}" for name, result in matrix[family].items())
        print(f"{family:24} {time.time() - start:5.1f} s  {states}  {_first_error(matrix[family])}", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(matrix, indent=1, sort_keys=True))
    _print_summary({family: matrix[family] for family in ran})


def _first_error(results: dict[str, Any]) -> str:
    return next((result["error"][:150] for result in results.values() if result["status"] != "passed"), "")


def _print_summary(matrix: dict[str, dict[str, Any]]) -> None:
    passed = [family for family, results in matrix.items() if all(r["status"] == "passed" for r in results.values())]
    print(f"\n{len(passed)} of {len(matrix)} families pass all checks")
    groups: dict[tuple[str, str], list[str]] = {}
    for family, results in matrix.items():
        bad = next((r for r in results.values() if r["status"] != "passed"), None)
        if bad is not None:
            groups.setdefault((bad["status"], _without_numbers(bad["error"])), []).append(family)
    for (status, error), names in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"\n{len(names)} x {status}: {error[:160]}\n   {', '.join(names)}")
    print(Counter(result["status"] for results in matrix.values() for result in results.values()))


def _without_numbers(text: str) -> str:
    return "".join("#" if character.isdigit() else character for character in text)[:120]


if __name__ == "__main__":
    main()
