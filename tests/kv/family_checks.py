"""Run every family of models through the checks of the compressed cache, and print what fails.

    python -m tests.kv.family_checks                       # all families (about 10 minutes), a summary by error
    python -m tests.kv.family_checks llama gemma2 -v       # some families, with the traceback of each failure
    python -m tests.kv.family_checks --results out/support    # one file for each family, for support_page.py

Most checks compare the compressed cache with the model's own cache. `CHECKS` lists them. The status of a check is one
of

* passed
* refused: a ValueError when the cache was made
* failed: another error, or an error after the cache was made
* wrong: no error, but a wrong result
* stock: the model does not run with its own cache if its only input is text
* not built: the model could not be made

A check that has passed also says whether the family supports the feature: `SUPPORTED`, `NOT_SUPPORTED` (it is refused
with an error), `IN_PART` or `DOES_NOT_APPLY`, and the reason if it is not `SUPPORTED`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from suffice.kv import CompressedCache, CrossAttentionCache, prefill
from suffice.kv.hf.layers import find_decoder
from tests.kv.families import WINDOW, families
from tests.kv.family_cases import LENGTH, Case, MaskedOracle, get_case
from tests.kv.flash import flash_package

SUPPORTED, NOT_SUPPORTED, IN_PART, DOES_NOT_APPLY = "yes", "no", "part", "–"
CHUNK = 16
LONG_WINDOW = 8 * WINDOW  # longer than the prompt
BUDGET = 0.5
POLICIES = ("capkv-salience", "capkv")  # heads of unequal length, and of equal length
# Models whose layers all have a sliding window, or that have an encoder, cannot be replayed; latents need another
# allocation, and some scores need an output projection.
NO_PROFILE = "so that its head profile can be measured"
NO_REPAIR = "repair must be False for"
NO_THRESHOLD = "allocation must give each layer a budget of its own"
NO_REPLAY = f"{NO_THRESHOLD}|all of whose layers have a sliding window|encoder-decoder|no linear layer named"
TOLERANCE = 1e-4  # relative to the largest logit; rounding errors are 1e-6, a missing entry changes about 1e-3
# Errors of the logits with 8 bits, relative to the largest logit: for half of the tokens, and for nine tenths of them.
BITS_TOLERANCES = {0.5: 0.025, 0.9: 0.1}


class Answer(NamedTuple):
    """Whether a family supports a feature, and the reason if it does not."""

    support: str
    reason: str = ""


class WrongResultError(AssertionError):
    """The result of the compressed cache differs from the expected result."""


class RefusedError(ValueError):
    """The compressed cache could not be made."""


def make_cache(case: Case, policy: str, budget: float = BUDGET, **options: Any) -> CompressedCache:
    """Return a new compressed cache.

    Raises:
        RefusedError: the cache refuses the model.

    """
    try:
        return CompressedCache(case.model, policy, budget, **options)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def usable_policies(case: Case) -> tuple[list[str], Answer]:
    """Return the policies that a model can have, and the answer to a check of all of them.

    Models whose head profile cannot be measured have the policy without a profile only.

    Raises:
        RefusedError: the cache refuses the model for another reason.

    """
    usable, answer = list[str](), Answer(SUPPORTED)
    for policy in POLICIES:
        try:
            make_cache(case, policy)
        except RefusedError as error:
            if NO_PROFILE not in str(error):
                raise
            answer = Answer(IN_PART, str(error))
        else:
            usable.append(policy)
    return usable, answer


# ---- Comparisons -----------------------------------------------------------------------------------------------------


def check_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise an error if results differ by more than rounding errors."""
    error = float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    if not error <= TOLERANCE:
        raise WrongResultError(f"{what} differ (relative error {error:.1e})")


def compare_with_oracle(case: Case, cache: CompressedCache, pieces: Sequence[Tensor]) -> None:
    """Feed pieces of a text to an empty compressed cache and to the oracle, and compare the logits of every piece."""
    logits, kept = [], []
    for piece in pieces:
        kept.append(kept_positions(cache))
        logits.append(case.forward(piece, cache).logits)
    oracle = MaskedOracle(case)
    for number, piece in enumerate(pieces):
        check_close(logits[number], oracle.forward(piece, kept[number]), f"logits of call {number}")


def kept_positions(cache: CompressedCache) -> dict[int, Tensor]:
    """Return the kept positions by the id of the attention module."""
    return {
        id(layer.module): cache.kept_positions(layer.index).clone()
        for layer in cache.compressed_layers
        if layer.storage is not None
    }


def num_readable(cache: CompressedCache) -> int:
    """Return how many tokens of the prompt the next token can read in the compressed layers."""
    return min([LENGTH, *(layer.max_readable or LENGTH for layer in cache.compressed_layers)])


def check_counts(cache: CompressedCache, least: int, most: int) -> None:
    """Check that heads keep `least` to `most` entries on average, and equal numbers if the allocation requires it."""
    counts = [head.tokens_kept for head in cache.report().heads]
    average = sum(counts) / max(1, len(counts))
    if not least <= average <= most:
        raise WrongResultError(f"{average:g} entries are kept on average instead of {least} to {most}")
    if not cache.policy.allocation.per_head and len(set(counts)) > 1:
        raise WrongResultError("heads keep different numbers of entries")


# ---- Checks ----------------------------------------------------------------------------------------------------------


def check_construction(case: Case) -> None:
    """A cache can be made with both policies."""
    for policy in POLICIES:
        make_cache(case, policy)


def check_full_budget(case: Case) -> None:
    """With the full budget, generated tokens and logits equal those of the model's own cache."""
    expected = case.generate(case.prompt())
    for policy in POLICIES:
        got = case.generate(case.prompt(), cache=make_cache(case, policy, 1.0))
        if not torch.equal(got.tokens, expected.tokens):
            raise WrongResultError(f"{policy}: generated tokens differ")
        check_close(got.logits, expected.logits, f"{policy}: logits")


def check_half_budget(case: Case, policy: str = POLICIES[0]) -> None:
    """With half the budget and the default policy, counts are exact, and logits equal those of the oracle."""
    cache = make_cache(case, policy)
    case.generate(case.prompt(), cache=cache)
    ids = case.prompt(LENGTH + 6)
    cache = make_cache(case, policy)
    case.forward(ids[:, :LENGTH], cache)
    half = int(BUDGET * num_readable(cache))
    check_counts(cache, half, half)
    cache = make_cache(case, policy)
    compare_with_oracle(case, cache, ids.split([LENGTH, 1, 1, 3, 1], 1))


def check_equal_heads(case: Case) -> None:
    """The check `half` with the policy `capkv`, whose heads keep equal numbers of entries."""
    check_half_budget(case, POLICIES[1])


def check_always(case: Case) -> Answer:
    """With `evict="always"`, chunks and generated tokens are evicted, and logits equal those of the oracle."""
    sizes = [CHUNK, CHUNK, LENGTH - 2 * CHUNK, *[1] * 8]
    policies, answer = usable_policies(case)
    for policy in policies:
        cache = make_cache(case, policy, LENGTH // 2, evict="always", interval=4)
        compare_with_oracle(case, cache, case.prompt(sum(sizes)).split(sizes, 1))
        readable = num_readable(cache)
        check_counts(cache, min(LENGTH // 2, readable), min(LENGTH // 2 + 3, readable + 1))
    return answer


def check_untouched(case: Case) -> None:
    """Layers that are not compressed hold the same state as in the model's own cache."""
    cache = make_cache(case, POLICIES[0])
    case.forward(case.prompt(), cache)
    compressed = {layer.index for layer in cache.compressed_layers}
    states = {index: _states(layer) for index, layer in enumerate(cache.layers) if index not in compressed}
    del cache
    if not states:
        return
    stock = case.forward(case.prompt(), None).past_key_values
    for index, state in states.items():
        expected = _states(stock.layers[index])
        if set(state) != set(expected):
            raise WrongResultError(f"layer {index} holds {sorted(state)} instead of {sorted(expected)}")
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape:
                raise WrongResultError(f"{name} of layer {index} has shape {list(tensor.shape)}")
            check_close(tensor, expected[name], f"{name} of layer {index}")


def _states(layer: Any) -> dict[str, Tensor]:
    """Return the tensors that a cache layer holds, by name."""
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        parts = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}{key}": part for key, part in parts.items() if isinstance(part, Tensor) and part.numel()}
    return {name: part.float() for name, part in found.items()}


def check_padding(case: Case) -> None:
    """Rows of a left-padded batch equal single runs, for models whose own cache has this property."""
    prompts = [case.prompt(30, seed=1), case.prompt(LENGTH, seed=2)]
    ids, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for row, own in enumerate(prompts):
        ids[row, -own.shape[1] :], mask[row, -own.shape[1] :] = own[0], 1
    if not _stock_rows_are_independent(case, ids, mask, prompts):
        return
    for policy in POLICIES:
        together = case.generate(ids, mask, make_cache(case, policy))
        for row, own in enumerate(prompts):
            alone = case.generate(own, cache=make_cache(case, policy))
            if not torch.equal(alone.tokens[0], together.tokens[row]):
                raise WrongResultError(f"{policy}: tokens of row {row} differ from the single run")
            check_close(together.logits[row], alone.logits[0], f"{policy}: logits of row {row}")


def _stock_rows_are_independent(case: Case, ids: Tensor, mask: Tensor, prompts: list[Tensor]) -> bool:
    """Return whether rows of a padded batch have the logits and keys of single runs, with the model's own cache.

    Some models count padding in positions: their logits are the same, but their keys are rotated by other angles.
    """
    together = case.generate(ids, mask)
    for row, own in enumerate(prompts):
        alone = case.generate(own)
        pairs = [(together.logits[row], alone.logits[0])]
        for layer, single in zip(_layers(together.cache), _layers(alone.cache), strict=True):
            keys, single_keys = getattr(layer, "keys", None), getattr(single, "keys", None)
            if isinstance(keys, Tensor) and isinstance(single_keys, Tensor) and keys.shape[2] >= own.shape[1]:
                pairs.append((keys[row, :, -own.shape[1] :], single_keys[0, :, -own.shape[1] :]))
        if any(float((a - b).abs().max()) > TOLERANCE * float(b.abs().max()) for a, b in pairs):
            return False
    return True


def _layers(cache: Any) -> list[Any]:
    """Return the layers of a cache; of the self-attention, if there is more than one kind."""
    return list(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))


def check_cross_attention(case: Case) -> Answer:
    """With the full budget for the cross-attention, results equal the stock cache; with half of it, half are kept.

    Models whose cross-attention cannot be compressed are refused when the cache is made.
    """
    if not case.is_encoder_decoder:
        return Answer(DOES_NOT_APPLY, "it has no encoder")
    try:
        full, half = CrossAttentionCache(case.model, budget=1.0), CrossAttentionCache(case.model, budget=0.5)
    except ValueError as error:
        return Answer(NOT_SUPPORTED, str(error))
    expected = case.generate(case.prompt())
    got = case.generate(case.prompt(), cache=EncoderDecoderCache(DynamicCache(), full))
    if not torch.equal(got.tokens, expected.tokens):
        raise WrongResultError("generated tokens differ")
    check_close(got.logits, expected.logits, "logits")
    case.generate(case.prompt(), cache=EncoderDecoderCache(DynamicCache(), half))
    counts = [(head.tokens_kept, head.tokens_seen) for head in half.report().heads]
    if any(2 * kept != seen for kept, seen in counts):
        raise WrongResultError(f"entries of the encoder are kept as {counts} instead of half")
    return Answer(SUPPORTED)


def check_long_window(case: Case) -> None:
    """Full and half budget, for a model whose sliding windows are longer than the prompt."""
    if case.has_windows:
        longer = get_case(case.family, LONG_WINDOW)
        check_full_budget(longer)
        for policy in POLICIES:
            check_half_budget(longer, policy)


def check_bits(case: Case) -> Answer:
    """With 8 bits for each number, logits are close to those with all bits, and entries were quantized."""
    policies, answer = usable_policies(case)
    for policy in policies:
        plain, quantized = make_cache(case, policy, 1.0), make_cache(case, policy, 1.0, bits=8)
        errors: list[Tensor] = []
        for piece in case.prompt(LENGTH + 70).split([LENGTH, 68, 1, 1], 1):
            expected, got = (case.forward(piece, cache).logits for cache in (plain, quantized))
            errors.append(((got - expected).abs().amax(-1) / expected.abs().max().clamp_min(1e-9)).flatten())
        # A few tokens may differ much more: a rounding error can send a token to another expert, and can decide between
        # entries that get almost the same attention in a random model.
        for share, tolerance in BITS_TOLERANCES.items():
            error = float(torch.cat(errors).quantile(share))
            if error > tolerance:
                raise WrongResultError(
                    f"{policy}: {share:.0%} of the logits differ by up to {error:.2g} of the largest"
                )
        if not any(head.value_error for head in quantized.report().heads) and num_readable(quantized) == LENGTH:
            raise WrongResultError(f"{policy}: nothing was quantized")
    return answer


def check_replay(case: Case) -> Answer:
    """After a replay, later logits equal those of the oracle, for scores from attention and from gradients.

    Models that cache latents refuse the allocation of both policies; they are checked with equal budgets.
    """
    ids, reasons, num_supported = case.prompt(LENGTH + 6), list[str](), 0
    for policy in ("kvzip", "kvgrad"):
        cache = _replayed_cache(case, policy, ids[:, :LENGTH], reasons)
        if cache is None:
            continue
        counts = [head.tokens_kept for head in cache.report().heads]
        if sum(counts) != int(BUDGET * LENGTH) * len(counts):
            raise WrongResultError(f"{policy}: {sum(counts)} entries are kept in {len(counts)} heads")
        oracle = MaskedOracle(case)
        oracle.forward(ids[:, :LENGTH], {})
        for piece in ids[:, LENGTH:].split([1, 1, 3, 1], 1):
            kept = kept_positions(cache)
            check_close(case.forward(piece, cache).logits, oracle.forward(piece, kept), f"{policy}: logits")
        num_supported += 1
    support = SUPPORTED if not reasons else IN_PART if num_supported else NOT_SUPPORTED
    return Answer(support, "; ".join(reasons))


def _replayed_cache(case: Case, policy: str, prompt: Tensor, reasons: list[str]) -> CompressedCache | None:
    """Return a cache of a prompt after a replay, None if it is refused. Add the errors to the reasons."""
    for options in ({}, {"allocation": "equal"}):
        try:
            cache = make_cache(case, policy, **options)
            prefill(case.model, {"input_ids": prompt}, [cache])
        except ValueError as error:
            if not re.search(NO_REPLAY, str(error)):
                raise
            reasons.append(f"{policy}: {error}")
            if not re.search(NO_THRESHOLD, str(error)):
                return None
        else:
            return cache
    return None


def check_repair(case: Case) -> Answer:
    """A repair keeps the entries that are kept without it, and the held-out errors of no head increase.

    With the full budget, nothing is repaired.
    """
    policies, answer = usable_policies(case)
    for policy in policies:
        plain = make_cache(case, policy)
        try:
            repaired = CompressedCache(case.model, policy, BUDGET, repair=True)
        except ValueError as error:
            if re.search(NO_REPAIR, str(error)):
                return Answer(NOT_SUPPORTED, str(error))
            raise
        for cache in (plain, repaired):
            case.forward(case.prompt(), cache)
        kept = kept_positions(plain)
        if any(not torch.equal(own, kept[key]) for key, own in kept_positions(repaired).items()):
            raise WrongResultError(f"{policy}: other entries are kept with the repair")
        for head in repaired.report().heads:
            repair = head.repair
            if repair is None:
                raise WrongResultError(f"{policy}: layer {head.layer} was not repaired")
            if repair.error_before is not None and not repair.error_after <= repair.error_before * (1 + TOLERANCE):
                raise WrongResultError(f"{policy}: the error of layer {head.layer}, head {head.head} increases")
        if not bool(case.forward(case.prompt(3, seed=1), repaired).logits.isfinite().all()):
            raise WrongResultError(f"{policy}: logits are not finite")
        full = [make_cache(case, policy, 1.0), CompressedCache(case.model, policy, 1.0, repair=True)]
        logits = [[case.forward(ids, cache).logits for ids in case.prompt().split([36, 4], 1)] for cache in full]
        check_close(logits[1][1], logits[0][1], f"{policy}: logits with the full budget")
    return answer


@contextlib.contextmanager
def _implementation(case: Case, name: str | None) -> Iterator[None]:
    """Have a model use an attention implementation; None for its own.

    Raises:
        ValueError: the model does not accept it.

    """
    configs = {id(module.config): module.config for module in case.model.modules() if hasattr(module, "config")}
    own = {key: getattr(config, "_attn_implementation_internal", None) for key, config in configs.items()}
    try:
        for key, config in configs.items():
            config._attn_implementation_internal = name or own[key]
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = own[key]


def _logits(case: Case, pieces: Sequence[Tensor], cache: Any = None) -> list[Tensor]:
    """Return the logits of every piece of a text. Without a cache, the model makes its own."""
    logits = []
    for piece in pieces:
        outputs = case.forward(piece, cache)
        cache = cache if isinstance(cache, CompressedCache) else outputs.past_key_values
        logits.append(outputs.logits)
    return logits


def check_flash(case: Case) -> Answer:
    """With FlashAttention, logits and kept entries equal those with the model's own attention implementation.

    Some models give other logits with FlashAttention with their own cache too. For them, logits equal those of the
    model's own cache with the full budget.
    """
    if not getattr(find_decoder(case.model), "_supports_flash_attn", False):
        return Answer(DOES_NOT_APPLY, "transformers does not let it use FlashAttention")
    policies, answer = usable_policies(case)
    pieces = case.prompt(LENGTH + 4).split([LENGTH, 1, 3], 1)
    # SDPA of transformers 5.2 ignores the soft cap of logits, which FlashAttention applies.
    has_softcap = any(getattr(getattr(x, "config", None), "attn_logit_softcapping", None) for x in case.model.modules())
    stock, full, half = [], [], []
    with pytest.MonkeyPatch.context() as patch, flash_package(patch) as package:
        for name in ("eager" if has_softcap else None, "flash_attention_2"):
            try:
                with _implementation(case, name):
                    pass
            except ValueError as error:  # GPT-OSS of transformers 5.2 accepts FlashAttention 3 only
                return Answer(DOES_NOT_APPLY, str(error))
            with _implementation(case, name):
                try:
                    stock.append(_logits(case, pieces))
                except Exception:  # for example GPT-2 in float32, without a linear layer that tells the dtype
                    return Answer(DOES_NOT_APPLY, f"the model does not run with {name or 'its own attention'}")
                full.append([_logits(case, pieces, make_cache(case, policy, 1.0)) for policy in policies])
                half.append([])
                for policy in policies:
                    cache = make_cache(case, policy)
                    half[-1].append((_logits(case, pieces, cache), kept_positions(cache)))
    if not package.shapes:
        return Answer(DOES_NOT_APPLY, "its attention does not call FlashAttention")
    for number, policy in enumerate(policies):
        for one, other in zip(full[1][number], stock[1], strict=True):
            check_close(one, other, f"{policy}: logits with FlashAttention and the full budget")
        if any(float((x - y).abs().max() / y.abs().max()) > TOLERANCE for x, y in zip(stock[1], stock[0], strict=True)):
            continue
        (expected, kept), (got, kept_with_flash) = half[0][number], half[1][number]
        for call, (one, other) in enumerate(zip(got, expected, strict=True)):
            check_close(one, other, f"{policy}: logits of call {call} with FlashAttention")
        if any(not torch.equal(x, kept[key]) for key, x in kept_with_flash.items()):
            raise WrongResultError(f"{policy}: other entries are kept with FlashAttention")
    return answer


CHECKS: dict[str, Callable[[Case], Answer | None]] = {
    "construction": check_construction,
    "full": check_full_budget,
    "half": check_half_budget,
    "equal": check_equal_heads,
    "always": check_always,
    "untouched": check_untouched,
    "padding": check_padding,
    "window": check_long_window,
    "cross": check_cross_attention,
    "bits": check_bits,
    "replay": check_replay,
    "repair": check_repair,
    "flash": check_flash,
}

# ---- Results ---------------------------------------------------------------------------------------------------------

Results = dict[str, dict[str, str]]  # by check: status, error and traceback


def run_checks(family: str, checks: Sequence[str] = tuple(CHECKS)) -> Results:
    """Return the results of a family, by check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = get_case(family)
            stock_error = run_stock(case)
        except Exception as error:
            return dict.fromkeys(checks, _result("not built", error))
        return {
            name: _run_check(name, case) if name == "construction" or stock_error is None else stock_error
            for name in checks
        }


def _run_check(name: str, case: Case) -> dict[str, str]:
    try:
        answer = CHECKS[name](case) or Answer(SUPPORTED)
    except WrongResultError as error:
        return _result("wrong", error)
    except RefusedError as error:
        return _result("refused", error)
    except Exception as error:
        return _result("failed", error)
    return {"status": "passed", "error": "", **answer._asdict()}


def run_stock(case: Case) -> dict[str, str] | None:
    """Run a model with its own cache, in pieces and with `generate`; return the error, or None if there is none."""
    try:
        cache = None
        for piece in case.prompt().split([LENGTH - 8, 4, 4], 1):
            cache = case.forward(piece, cache).past_key_values
            if _num_tokens(cache) == 0:
                return {"status": "stock", "error": "the model keeps no cache of keys and values"}
        case.generate(case.prompt())
    except Exception as error:
        return _result("stock", error)
    return None


def _num_tokens(cache: Any) -> int:
    """Return the number of tokens in a cache; 0 if it holds no keys and values."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, NotImplementedError):
        return 0


def _result(status: str, error: Exception) -> dict[str, str]:
    text = " ".join(str(error).split())
    if status not in ("wrong", "refused"):
        text = f"{type(error).__name__}: {text}"
    return {"status": status, "error": text[:400], "traceback": "".join(traceback.format_exception(error))}


def write_results(folder: Path, family: str, results: Results) -> None:
    """Write the results of a family to a file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{family}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


# ---- Command ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the checks and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all if none is given")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--results", type=Path, help="folder for the results, one file for each family")
    parser.add_argument("-v", "--verbose", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    matrix: dict[str, Results] = {}
    for family in options.families or families():
        start = time.time()
        with _time_limit(300):
            matrix[family] = run_checks(family, options.checks)
        for name, result in matrix[family].items():
            if options.verbose and "traceback" in result:
                print(name, result["traceback"], file=sys.stderr)
        states = " ".join(f"{name}:{result['status']}" for name, result in matrix[family].items())
        print(f"{family:24} {time.time() - start:5.1f} s  {states}  {_first_error(matrix[family])}", flush=True)
        if options.results:
            write_results(options.results, family, matrix[family])
    _print_summary(matrix)


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


def _first_error(results: Results) -> str:
    return next((result["error"][:150] for result in results.values() if result["status"] != "passed"), "")


def _print_summary(matrix: dict[str, Results]) -> None:
    passed = [family for family, results in matrix.items() if all(r["status"] == "passed" for r in results.values())]
    print(f"\n{len(passed)} of {len(matrix)} families pass all checks")
    groups: dict[tuple[str, str], list[str]] = {}
    for family, results in matrix.items():
        bad = next((r for r in results.values() if r["status"] != "passed"), None)
        if bad is not None:
            digits = str.maketrans("0123456789", "#" * 10)
            groups.setdefault((bad["status"], bad["error"].translate(digits)[:120]), []).append(family)
    for (status, error), names in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"\n{len(names)} x {status}: {error}\n   {', '.join(names)}")
    print(Counter(result["status"] for results in matrix.values() for result in results.values()))


if __name__ == "__main__":
    main()
