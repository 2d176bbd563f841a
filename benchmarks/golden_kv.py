"""Golden numbers of `suffice.kv`: compute everything that must stay as it is, store it, and compare later.

Floats are stored to the last digit, tensors as the SHA-256 of their bytes. Names in the file do not depend on names
of classes, functions or arguments: all access to the library goes through the adapters below, and whoever renames
something edits these alone.

    python benchmarks/golden_kv.py --write golden.json
    python benchmarks/golden_kv.py --check golden.json [--quick] [--only fixed tiny ...]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import pydoc_data.topics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tokenizers
import torch
import transformers
from torch import Tensor

# ---- Adapters: the only lines that know the library's names ---------------------------------------------------------

os.environ["TRITON_INTERPRET"] = "1"  # of the part `kernels`; must be set before Triton is imported
import suffice  # isort: skip
from suffice import information  # isort: skip
from suffice import folders  # isort: skip
from suffice.kv import DEFAULT_POLICY, CompressedCache, Policy, load_model  # isort: skip
from suffice.kv.backend import triton_backend  # isort: skip
from suffice.kv.backend.torch_backend import TORCH_BACKEND  # isort: skip
from suffice.kv.budget import calibration, protection  # isort: skip
from suffice.kv.budget import profile_from_weights as slow_pairs  # isort: skip
from suffice.kv.budget.allocation import AdaKV, Equal, MarginalCapacity, Pyramid  # isort: skip
from suffice.kv.budget.head_profile import HeadProfile  # isort: skip
from suffice.kv.budget.profile import Profile  # isort: skip
from suffice.kv.cache import batched, prefill  # isort: skip
from suffice.kv.eval import answer as answering  # isort: skip
from suffice.kv.eval import compare as comparing  # isort: skip
from suffice.kv.eval import demo, fidelity, generation, tasks, user_prompts  # isort: skip
from suffice.kv.eval import tune as tuning  # isort: skip
from suffice.kv.hf import fingerprint as identity  # isort: skip
from suffice.kv.hf.rotary import Frequencies, RotaryEmbedding  # isort: skip
from suffice.kv.policy import capacity_share as measuring  # isort: skip
from suffice.kv.policy import directions, estimators, weights  # isort: skip
from suffice.kv.policy import registry as named  # isort: skip
from suffice.kv.policy.attention_stats import AttentionStats  # isort: skip
from suffice.kv.policy.layer_context import EntryPositions  # isort: skip
from suffice.kv.policy.layer_context import LayerContext  # isort: skip
from suffice.kv.policy.selection import Greedy, Rounds, TopK, TwoStage  # isort: skip
from suffice.kv.policy.weight_state import WeightState  # isort: skip
from suffice.kv.storage import uniform  # isort: skip

RENAMED: dict[str, str] = {"adakv": "pooled"}  # new name of a policy, allocation or task: its name in the file
NEW = {old: new for new, old in RENAMED.items()}
DEFAULT = RENAMED.get(DEFAULT_POLICY, DEFAULT_POLICY)
# Of what is passed on by keyword: the name here, and the new one, as {"interval": "every"}.
KEYWORDS: dict[str, dict[str, str]] = {
    "cache": {}, "answer": {"chunk": "chunk_size"}, "closeness": {}, "tuned": {}, "information": {},
}  # fmt: skip
INFORMATION = {"gram": information.gram_matrix} | {
    name: getattr(information, name)
    for name in (
        "noise_variance", "factorize", "capacity", "leverage_scores", "effective_dimension", "deletion_cost",
        "psd_cholesky", "select_top", "select_by_leverage", "select_greedy", "trace_ratio", "class_information",
        "cluster_nmi", "linear_probe",
    )
}  # fmt: skip


def words(where: str, options: dict[str, Any]) -> dict[str, Any]:
    return {KEYWORDS[where].get(name, name): value for name, value in options.items()}


def inform(function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of the information core."""
    return INFORMATION[function](*arguments, **words("information", options))


def factor_parts(vectors: Tensor, weights: Tensor, **options: Any) -> list[Tensor]:
    made = inform("factorize", vectors, weights, **options)
    return [made.cholesky, made.noise, made.vector_scale, made.weight_scale]


def policies(replay=False) -> dict[str, Any]:
    return {RENAMED.get(name, name): policy for name, policy in named.policies(replay=False).items()}


def allocations() -> dict[str, Any]:
    return {RENAMED.get(name, name): allocation for name, allocation in named.allocations().items()}


def more_allocations() -> dict[str, Any]:
    return {
        "equal": Equal(),
        "pyramid-5": Pyramid(beta=5),
        "pooled-half": AdaKV(safeguard=0.5),
        "marginal-none": MarginalCapacity(safeguard=0.0),
        "profile-steep": HeadProfile(power=1.5, floor=0.05),
    }


def weight_parts() -> dict[str, Any]:
    w = weights
    return {
        "window": w.WindowAttention(window_size=8, kernel_size=3),
        "window-prefix": w.WindowAttention(window_size=16, kernel_size=5, prefix_only=True, floor=1e-4),
        "last": w.LastQueryAttention(),
        "accumulated": w.AccumulatedAttention(),
        "sampled": w.SampledAttention(count=7, min_distance=9),
        "mean-query": w.MeanQuery(tau=2.0, recent=20),
        "mean-query-moving": w.MeanQuery(half_life=20.0),
        "expected": w.ExpectedAttention(future=64),
        "expected-recent": w.ExpectedAttention(future=0, recent=30, skip=0),
        "expected-pooled": w.ExpectedAttention(future=16, pooled=True),
        "expected-diagonal": w.ExpectedAttention(future=0, recent=40, diagonal=True),
        "expected-moving": w.ExpectedAttention(future=0, pooled=True, diagonal=True, half_life=9.0),
        "key-norm": w.KeyNorm(),
        "salience": w.KeySalience(beta=2.0),
        "recency": w.Recency(),
        "random": w.Random(seed=3),
        "uniform": w.Uniform(),
        "sum": w.WindowAttention(window_size=8) + 0.5 * w.KeyNorm() + 2 * w.KeySalience(),
        "product": w.KeyNorm() * w.KeySalience(),
    }


def direction_parts() -> dict[str, Any]:
    d = directions
    return {
        "value": d.Value(),
        "output-value": d.OutputValue(),
        "key": d.Key(),
        "key-unit": d.Key(unit=True),
        "key-plain": d.Key(rotary=False, centered=True),
        "constant": d.Constant(),
    }


def estimator_parts() -> dict[str, Any]:
    e = estimators
    return {
        "trace": e.Trace(),
        "trace-1": e.Trace(norm=1, power=1),
        "leverage": e.Leverage(),
        "leverage-root": e.Leverage(power=0.5, ridge=0.01),
        "leverage-fixed": e.Leverage(ridge=1.0, relative=False),
        "one": e.OneDirection(),
    }


def selection_parts() -> dict[str, Any]:
    return {"top": TopK(), "two-stage": TwoStage(0.3), "rounds": Rounds(3), "greedy": Greedy()}


def compose(weight: Any, direction: Any, estimator: Any, selection: Any = None) -> Any:
    return Policy(weights=weight, directions=direction, estimator=estimator, selection=selection or TopK(), name="own")


def vary(policy: Any, allocation: Any) -> Any:
    return replace(policy, allocation=allocation)


def with_profile(allocation: Any, attention: tuple[tuple[float, ...], ...]) -> Any:
    """Return the allocation, one by head profile with these numbers where it has none of its own."""
    if not isinstance(allocation, HeadProfile):
        return allocation
    return replace(allocation, profile=Profile(attention, "fixed", "fixed"))


BACKEND = [TORCH_BACKEND]  # what computes the numbers; another one within `kernels_on_cpu`


def signals(queries: Tensor, keys: Tensor, values: Tensor, **facts: Any) -> Any:
    """Take valid, positions, query_positions, output, rotary, received, layer and layers."""
    places = {"valid": "valid", "entries": "positions", "queries": "query_positions"}
    where = EntryPositions(**{new: facts.pop(old) for new, old in places.items() if old in facts})
    context = LayerContext(facts.pop("layer", 0), facts.pop("layers", 1))
    state = WeightState(attention_received=facts.pop("received", None))
    renamed = {"output_weight" if name == "output" else name: value for name, value in facts.items()}
    return AttentionStats(queries, keys, values, positions=where, context=context, state=state, **renamed)


def score_steps(policy: Any, given: Any) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield "log-weights", lambda: policy.weights.log_weights(given)
    yield "log-weights-masked", lambda: policy.objective(given, BACKEND[0]).log_weights()
    yield "linear-weights", lambda: policy.objective(given, BACKEND[0]).linear_weights()
    yield "scores", lambda: policy.score(given, BACKEND[0])
    yield "shares", lambda: policy.estimator.contributions(policy.objective(given, BACKEND[0]))


def vectors(policy: Any, given: Any) -> Tensor:
    return policy.directions.vectors(given)


def choose(policy: Any, given: Any, budget: float, sinks: int | None = None, window: int | None = None) -> Tensor:
    allowed = [protection.num_allowed(budget, seen) for seen in given.num_seen_per_row]
    objective = policy.objective(given, BACKEND[0])
    return policy.select(objective, policy.layer_budget(objective, allowed, protection.Protection(sinks, window)))


def capacity_share(given: Any, kept: Tensor) -> Tensor:
    return measuring.capacity_share(given, kept, BACKEND[0])


def make_cache(model: Any, policy: Any = DEFAULT, budget: float = 0.25, **options: Any) -> Any:
    """Take sinks, window, allocation, evict, interval, positions, measure_capacity, bits."""
    if isinstance(options.get("allocation"), str):
        options["allocation"] = NEW.get(options["allocation"], options["allocation"])
    policy = NEW.get(policy, policy) if isinstance(policy, str) else policy
    if "positions" in options:
        options["rerotate"] = options.pop("positions") == "compact"
    return CompressedCache(model, policy, budget, **words("cache", options))


def kept(cache: Any) -> dict[int, Tensor]:
    """Kept positions of each compressed layer, [batch, kv_heads, width], −1 for none."""
    return {layer.index: cache.kept_positions(layer.index) for layer in cache.compressed_layers}


def stored(cache: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of each compressed layer as they are read."""
    held = {layer.index: getattr(layer.storage, "entries", layer.storage) for layer in cache.compressed_layers}
    return {index: (entries.keys, entries.values) for index, entries in held.items()}


def report(cache: Any) -> dict[str, Any]:
    found = cache.report()
    heads = [
        (h.layer, h.head, h.tokens_seen, h.tokens_kept, h.bytes_full, h.bytes_kept, h.capacity_retained)
        for h in found.heads
    ]
    columns = ("layer", "head", "seen", "held", "bytes-full", "bytes-held", "capacity")
    return {
        "seen": found.tokens_seen,
        "held": found.tokens_kept,
        "batch": found.batch,
        "bytes-full": found.bytes_full,
        "bytes-held": found.bytes_kept,
        "bytes-index": found.bytes_index,
        "capacity": found.capacity_retained,
        **{f"heads-{name}": column for name, column in zip(columns, map(list, zip(*heads, strict=True)), strict=True)},
    }


def save(cache: Any, model: Any, path: Path) -> Path:
    return cache.save(model, path)


def restore(path: Path, model: Any, policy: Any = None) -> Any:
    return CompressedCache.load(path, model, policy)


def copied(cache: Any) -> Any:
    return cache.copy()


def prefill_together(model: Any, inputs: dict[str, Tensor], caches: list[Any], share: bool) -> Tensor:
    """Fill all caches in one forward pass; logits of the last token."""
    return prefill.prefill(model, inputs, caches, share_statistics=share).logits


def as_rows(caches: list[Any]) -> Any:
    """Return one cache whose row r is `caches[r]`."""
    return batched.BatchedCaches(caches)


def read_chunks(model: Any, ids: Tensor, cache: Any, chunk: int | None) -> None:
    generation.fill_cache(model, ids, cache, chunk)


def answer(model: Any, tokenizer: Any, document: str, question: str | None, **options: Any) -> dict[str, Any]:
    if "positions" in options:
        options["rerotate"] = options.pop("positions") == "compact"
    if "allocation" in options:
        options["allocation"] = NEW.get(options["allocation"], options["allocation"])
    found, _ = answering.answer(model, tokenizer, document, question, **words("answer", options))
    return {
        "text": found.answer,
        "seen": found.tokens_seen,
        "held": found.tokens_kept,
        "bytes": [found.bytes_full, found.bytes_kept],
        "capacity": found.capacity_retained,
        "shares": torch.tensor([share for _, share in found.token_shares], dtype=torch.float64),
    }


def example(task: str, tokenizer: Any, tokens: int, seed: int) -> Any:
    return tasks.make_example(NEW.get(task, task), tokenizer, tokens=tokens, seed=seed)


def example_texts(example: Any, tokenizer: Any) -> dict[str, Any]:
    parts = example.prompt(tokenizer)
    return {
        "texts": [example.document, example.question, example.answer_prefix, example.answer],
        "right": [list(example.references), list(example.distractors), example.chance],
        "document": parts.document,
        "question": parts.question,
        "gold": example.answer_ids(tokenizer),
    }


def document_ids(example: Any, tokenizer: Any, aware: bool) -> Tensor:
    parts = example.prompt(tokenizer)
    return parts.input_ids if aware else parts.document


def task_names() -> list[str]:
    return [RENAMED.get(name, name) for name in tasks.TASKS]


def closeness(model: Any, tokenizer: Any, example: Any, cells: list[tuple[Any, ...]], **options: Any) -> list[Any]:
    """KL and more of each cell (policy, budget, allocation or None) against the full cache, which comes first.

    Accepts mode ("agnostic", "aware", "continuation"), answer, greedy_tokens, measure_capacity.
    """
    made = [fidelity.CacheConfig(NEW.get(p, p), budget, NEW.get(a, a)) for p, budget, a in cells]
    names = {
        "kl": "kl", "log_likelihood": "likelihood", "log_likelihood_change": "likelihood-change", "top1": "top1",
        "score": "score", "answer": "said", "agreement": "agreement", "agreed_tokens": "agreed", "tokens": "tokens",
        "tokens_kept": "held", "bytes_kept": "bytes-held", "bytes_full": "bytes-full", "capacity_retained": "capacity",
    }  # fmt: skip
    found = fidelity.evaluate(model, tokenizer, example, made, **words("closeness", options))
    return [{new: row[old] for old, new in names.items()} for row in found]


def calibrated(model: Any, tokenizer: Any = None, tokens: int | None = None) -> list[list[float]]:
    return [list(layer) for layer in calibration.calibrate(model, tokenizer, tokens=tokens).attention]


def known_profile(model: Any) -> list[list[float]]:
    return [list(layer) for layer in calibration.get_profile(model).attention]


def profile_of_weights(model: Any) -> list[list[float]]:
    return [list(layer) for layer in slow_pairs.profile_from_weights(model).attention]


def profile_budgets(attention: list[list[float]], budget: int, seen: int, least: int, most: int | None) -> Any:
    profile = Profile(tuple(map(tuple, attention)), "fixed", "fixed")
    return HeadProfile(profile=profile).entries(budget, seen, least, most)


def fingerprint(model: Any) -> str:
    return identity.fingerprint(model)


def load_default() -> tuple[Any, Any]:
    return load_model(dtype="float32")


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[list[int]]:
    """Let the library use its Triton kernels for tensors on the CPU; gives how often it asked whether it may."""
    asked = [0, 0, 0]

    def counted(number: int, answer: Callable[..., bool]) -> Callable[..., bool]:
        def ask(*tensors: Tensor) -> bool:
            asked[number] += 1
            return answer(*tensors)

        return ask

    with contextlib.ExitStack() as stack:
        patched = ((triton_backend, "supports"), (triton_backend, "can_use_kernels"), (uniform, "usable"))
        for number, (module, name) in enumerate(patched):
            answer = getattr(module, name) if name == "supports" else lambda *_: True
            stack.enter_context(mock.patch.object(module, name, counted(number, answer)))
        BACKEND[0] = triton_backend.TRITON_BACKEND
        try:
            yield asked
        finally:
            BACKEND[0] = TORCH_BACKEND


def isolate(folder: Path) -> None:
    """Keep what tiny models leave behind out of the user's cache folder; the default model is shared."""
    shared = folders.cache_folder() / "models"
    shared.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(shared)
    os.environ["SUFFICE_CACHE"] = str(folder)


def comparison(place: str) -> dict[str, Any]:
    """Run a short comparison: every metric of every sample, ranks and differences."""
    found = comparing.compare(
        policies=[NEW.get(name, name) for name in ("capkv", "h2o", "capkv-profile")],
        allocations=["own", NEW.get("pooled", "pooled")],
        budgets=[0.5, 40],
        tasks=(("text", "continuation"), ("multikey", "agnostic")),
        tokens=300,
        samples=2,
        greedy_tokens=4,
        model=place,
    )
    values: dict[str, Any] = {}
    for one in found.groups:
        s = one.settings
        name = "|".join(str(RENAMED.get(s[k], s[k])) for k in ("task", "mode", "policy", "allocation", "budget"))
        values[name] = {m: {str(k): v for k, v in x.items()} for m, x in one.values.items() if "seconds" not in m}
    against = [[row["mean"], row["low"], row["high"]] for row in found.differences(found.methods[0])]
    correlations = [row["spearman"] for row in found.capacity_correlations()]
    return {"values": values, "ranks": list(found.mean_ranks().values()), "against": against, "capacity": correlations}


def tuned(place: str, pairs: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    """Run a short search for the smallest safe budget. Accepts target_kl, target_agreement, mode."""
    found = tuning.tune(
        [user_prompts.UserPrompt(*pair) for pair in pairs],
        policies=[NEW.get(name, name) for name in ("capkv", "h2o")],
        allocations=["own", NEW.get("profile", "profile")],
        budgets=[0.3, 1.0, 0.7],
        max_new_tokens=4,
        model=place,
        **words("tuned", options),
    )
    trials = [[t.budget, t.mean, t.bound, t.within, t.safe, t.bytes_kept] for t in found.trials]
    return {"trials": trials, "best": None if found.best is None else found.best.budget}


def demonstration(model: Any, tokenizer: Any) -> list[Any]:
    names = tuple(NEW.get(name, name) for name in ("capkv", "streaming-llm"))
    found = demo.run_demo(model, tokenizer, tokens=300, num_facts=2, policies=names, budgets=(0.5,), seed=1)
    return [[list(row.kl), list(row.correct), list(row.answers), row.bytes_kept] for row in found.rows]


# ---- Values and their names: nothing below knows the library --------------------------------------------------------


class Book:
    """Values by name; containers are taken apart into plain leaves."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.refused: list[str] = []

    def put(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            value = digest(value)
        elif isinstance(value, float):
            value = value.hex()
        if isinstance(value, dict):
            for key, part in value.items():
                self.put(f"{name}/{key}", part)
        elif isinstance(value, (list, tuple)):
            self.put(f"{name}/count", len(value))
            for number, part in enumerate(value):
                self.put(f"{name}/{number}", part)
        else:
            assert name not in self.values, f"{name} comes twice"
            assert value is None or isinstance(value, (str, int)), f"{name} is a {type(value).__name__}"
            self.values[name] = value

    def attempt(self, name: str, compute: Callable[[], Any]) -> Any:
        """Put what is computed; if the library refuses it, put that."""
        try:
            value = compute()
        except (ValueError, ImportError) as error:
            self.refused.append(f"{name}: {error}")
            self.put(f"{name}/refused", "ImportError" if isinstance(error, ImportError) else "ValueError")
            return None
        self.put(name, value)
        return value

    def held(self, name: str, positions: Tensor) -> None:
        """Put kept indices: their hash, and how many each row and head keeps."""
        self.put(name, positions)
        self.counts(name, positions)

    def counts(self, name: str, positions: Tensor) -> None:
        self.put(f"{name}/counts", ",".join(map(str, (positions >= 0).sum(-1).flatten().tolist())))


def digest(x: Tensor) -> dict[str, Any]:
    x = x.detach().cpu().contiguous()
    raw = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    first = [value.hex() if isinstance(value, float) else str(value) for value in x.flatten()[:4].tolist()]
    return {
        "sha256": hashlib.sha256(raw.numpy().tobytes()).hexdigest(),
        "kind": f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}",
        "first": " ".join(first),
    }


# ---- Models and tensors ---------------------------------------------------------------------------------------------

SHARED: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 4}
GEMMA_LAYERS = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **c: transformers.LlamaConfig(**c),
    "qwen2": lambda **c: transformers.Qwen2Config(**c),
    "qwen3": lambda **c: transformers.Qwen3Config(**c, head_dim=16),
    "mistral": lambda **c: transformers.MistralConfig(**c, sliding_window=None),
    "phi3": lambda **c: transformers.Phi3Config(**c),
    "gemma3": lambda **c: transformers.Gemma3TextConfig(**{**c, **GEMMA}, layer_types=GEMMA_LAYERS),
    "mixtral": lambda **c: transformers.MixtralConfig(
        **c, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
}


def build(family: str, attn: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[family](**{**SHARED, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # at their initial values they would give every key the same length
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def byte_tokenizer() -> Any:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    core.train_from_iterator([text[:50_000]], trainer)
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False)


def prompt(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids = torch.randperm(95, generator=generator)[:length][None] + 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(*lengths: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = prompt(length, seed=row)["input_ids"][0]
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def rotary(dim: int) -> RotaryEmbedding:
    owner = SimpleNamespace(inv_freq=10_000.0 ** (-torch.arange(0, dim, 2) / dim))
    return RotaryEmbedding.half_split(Frequencies(owner))


def fixed_cases() -> Iterator[tuple[str, Any]]:
    """Signals of attention calls, by name."""
    shapes = {  # batch, KV heads, group, tokens, dimensions, dimensions of values
        "group1": (1, 4, 1, 90, 16, 16),
        "group3": (2, 2, 3, 150, 8, 12),
        "padded": (2, 2, 2, 100, 16, 16),
        "bf16": (1, 2, 3, 120, 16, 16),
        "chunk": (2, 2, 2, 80, 8, 8),
    }
    for seed, (name, (batch, heads, group, n, dim, width)) in enumerate(shapes.items()):
        torch.manual_seed(seed)
        asked = 20 if name == "chunk" else n
        q = 2 * torch.randn(batch, heads * group, asked, dim) + 0.5
        k = 2 * torch.randn(batch, heads, n, dim) + 0.3
        v = torch.randn(batch, heads, n, width) * torch.rand(batch, heads, n, 1)
        facts: dict[str, Any] = {"layer": 1, "layers": 3, "rotary": rotary(dim)}
        output = torch.randn(24, heads * group * width)
        if name == "padded":
            facts["valid"] = torch.arange(n)[None] >= torch.tensor([[0], [31]])
        if name == "bf16":
            q, k, v, output = (x.bfloat16() for x in (q, k, v, output))
        if name == "chunk":  # entries that earlier evictions left, and 20 new ones; one head holds fewer
            old = torch.stack([torch.randperm(150)[: n - 20].sort().values for _ in range(batch * heads)])
            old = old.view(batch, heads, -1)
            old[0, 1, :7] = -1
            new = torch.arange(150, 170).expand(batch, -1)
            facts["positions"] = torch.cat((old, new[:, None].expand(-1, heads, -1)), -1)
            facts["query_positions"] = new
            facts["received"] = torch.rand(batch, heads, n)
        yield name, signals(q, k, v, output=output, **facts)


# ---- Parts ----------------------------------------------------------------------------------------------------------


def fixed(book: Book, quick: bool) -> None:
    """Every policy, weight, direction, estimator, selection and allocation on fixed tensors."""
    for case, given in fixed_cases():
        profile = tuple(tuple(0.05 + 0.1 * ((3 * x + h) % 4) for h in range(given.keys.shape[1])) for x in range(3))
        every = {f"policy-{name}": policy for name, policy in policies(replay=False).items()}
        for name, weight in weight_parts().items():
            every[f"weight-{name}"] = compose(weight, direction_parts()["value"], estimator_parts()["leverage"])
        weight = weight_parts()["sum"]
        for name, direction in direction_parts().items():
            for other, estimator in estimator_parts().items():
                every[f"direction-{name}-{other}"] = compose(weight, direction, estimator)
        for name, selection in selection_parts().items():
            parts = direction_parts()["value"], estimator_parts()["leverage"]
            every[f"selection-{name}"] = compose(weight, *parts, selection)
        for label, allocation in {**allocations(), **more_allocations()}.items():
            for name in ("capkv", "h2o", "expected-attention", "keydiff"):
                every[f"allocation-{label}-{name}"] = vary(policies()[name], allocation)
        for name, policy in every.items():
            policy = vary(policy, with_profile(policy.allocation, profile))
            place = f"fixed/{case}/{name}"
            if not name.startswith("allocation"):
                for step, compute in score_steps(policy, given):
                    book.attempt(f"{place}/{step}", compute)
            if name.startswith("direction"):
                book.attempt(f"{place}/vectors", lambda p=policy, g=given: vectors(p, g))
            for label, options in {"quarter": {"budget": 0.25}, "own": {"budget": 40, "sinks": 2, "window": 9}}.items():
                found = book.attempt(f"{place}/{label}", lambda p=policy, g=given, o=options: choose(p, g, **o))
                if found is not None:
                    book.counts(f"{place}/{label}", found)
                if found is not None and name.startswith("policy"):
                    book.attempt(f"{place}/{label}/share", lambda g=given, f=found: capacity_share(g, f))
    attention = [[0.1, 0.02], [0.3, 0.11], [0.05, 0.4]]
    for numbers in ((20, 100, 4, None), (50, 100, 8, 60), (7, 30, 7, None), (99, 100, 0, None)):
        book.put(f"fixed/profile-budgets/{numbers}", profile_budgets(attention, *numbers))


def core(book: Book, quick: bool) -> None:
    """Put the information core on fixed tensors."""
    for name, dtype in {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}.items():
        torch.manual_seed(5)
        x, w = torch.randn(2, 3, 60, 10).to(dtype), torch.rand(2, 3, 60).to(dtype)
        valid = torch.rand(2, 3, 60) > 0.1
        protected = torch.zeros(2, 3, 60, dtype=torch.bool)
        protected[..., 20:23] = True
        subset = torch.rand(2, 3, 60) > 0.5
        options: dict[str, dict[str, Any]] = {
            "plain": {}, "valid": {"valid": valid}, "ridge": {"ridge": 0.01},
            "fixed": {"ridge": 1.0, "relative": False},
        }  # fmt: skip
        for label, more in options.items():
            place = f"core/{name}/{label}"
            for own in ("capacity", "leverage_scores", "effective_dimension"):
                book.put(f"{place}/{own}", inform(own, x, w, **more))
                book.put(f"{place}/{own}-unweighted", inform(own, x, **more))
            book.put(f"{place}/capacity-subset", inform("capacity", x, w, subset=subset, **more))
            scores = inform("leverage_scores", x, w, **more)
            book.put(f"{place}/deletion", inform("deletion_cost", scores))
            book.put(f"{place}/factor", factor_parts(x, w, **more))
            for rounds in (1, 3):
                kept_items = inform("select_by_leverage", x, w, 12, rounds=rounds, protected=protected & valid, **more)
                book.put(f"{place}/rounds-{rounds}", kept_items)
            book.put(f"{place}/greedy", inform("select_greedy", x, w, 12, protected=protected & valid, **more))
            book.put(
                f"{place}/top", inform("select_top", scores, 12, valid=more.get("valid"), protected=protected & valid)
            )
        gram = inform("gram", x, w)
        book.put(f"core/{name}/gram", gram)
        book.put(f"core/{name}/cholesky", inform("psd_cholesky", gram))
        book.put(f"core/{name}/noise", [inform("noise_variance", gram), inform("noise_variance", gram, 0.3, False)])
        for scale in (1e-15, 1e15):
            book.put(f"core/{name}/scaled-{scale}", inform("leverage_scores", x.float() * scale, w.float() / scale))
        groups = torch.arange(80) % 4
        points = (torch.randn(80, 6) + groups[:, None] * torch.linspace(0, 0.6, 6)).to(dtype)
        for own in ("trace_ratio", "class_information", "cluster_nmi", "linear_probe"):
            book.put(f"core/{name}/{own}", inform(own, points, groups))


def scene(
    book: Book, name: str, model: Any, cache: Any, inputs: dict[str, Tensor], new: int = 5, chunk: int = 0, **how: Any
) -> None:
    """Generate with a cache and put tokens, logits, what is kept and stored, and the report."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, chunk) if chunk else ():
            stop = min(start + chunk, ids.shape[1] - 1)
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        out = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=new, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **how,
        )  # fmt: skip
    book.put(f"{name}/tokens", [",".join(map(str, row)) for row in out.sequences[:, ids.shape[1] :].tolist()])
    book.put(f"{name}/logits", torch.stack(out.logits))
    state(book, name, cache)


def state(book: Book, name: str, cache: Any) -> None:
    for layer, positions in kept(cache).items():
        book.held(f"{name}/kept/{layer}", positions)
    for layer, pair in stored(cache).items():
        book.put(f"{name}/stored/{layer}", pair)
    book.put(f"{name}/report", report(cache))


def scenes() -> dict[str, dict[str, Any]]:
    """Options of a cache, with how a model is to read and go on; by name."""
    always = {"evict": "always", "interval": 4, "budget": 16, "new": 10}
    found: dict[str, dict[str, Any]] = {}
    for name in policies(replay=False):
        found[f"policy-{name}"] = {"policy": name, "budget": 0.5}
        found[f"policy-{name}-batch"] = {"policy": name, "budget": 0.3, "batch": True, "new": 3}
        found[f"policy-{name}-always"] = {"policy": name, **always, "batch": True}
    for split in allocations():
        for name in ("capkv", "h2o", "keydiff"):
            found[f"split-{split}-{name}"] = {"policy": name, "budget": 12, "allocation": split, "batch": True}
        for place in ("original", "compact"):
            found[f"split-{split}-chunks-{place}"] = {
                "policy": "capkv", "allocation": split, "positions": place, "chunk": 13, **always,
            }  # fmt: skip
    for split, allocation in more_allocations().items():
        found[f"split-own-{split}"] = {"policy": "capkv", "budget": 12, "allocation": allocation}
    for place in ("original", "compact"):
        found[f"positions-{place}"] = {"budget": 0.4, "positions": place}
        found[f"positions-{place}-batch"] = {"budget": 0.4, "positions": place, "batch": True}
        found[f"positions-{place}-always"] = {"positions": place, "batch": True, "chunk": 17, **always}
        found[f"positions-{place}-beams"] = {"positions": place, "batch": True, "num_beams": 3}
    found["beams"] = {"budget": 0.5, "num_beams": 3}
    found["beams-equal"] = {"policy": "capkv", "budget": 0.5, "num_beams": 2, "batch": True}
    found["beams-always"] = {"num_beams": 3, **always}
    found["chunks"] = {"chunk": 16, "budget": 0.5, "evict": "always"}
    found["protect"] = {"budget": 0.3, "sinks": 1, "window": 7}
    found["protect-nothing"] = {"policy": "h2o", "budget": 0.3, "sinks": 0, "window": 0}
    found["protect-nothing-always"] = {"policy": "h2o", "sinks": 0, "window": 0, **always}
    found["unmeasured"] = {"budget": 0.5, "measure_capacity": False}
    found["whole"] = {"budget": 1.0}
    moving = compose(weight_parts()["expected-moving"], direction_parts()["value"], estimator_parts()["leverage"])
    found["moving"] = {"policy": moving, "chunk": 11, **always}
    for name, selection in selection_parts().items():
        parts = weight_parts()["sum"], direction_parts()["output-value"], estimator_parts()["leverage-root"]
        found[f"selection-{name}"] = {"policy": compose(*parts, selection), "budget": 0.4, "batch": True}
    for bits in (8, 4, 3, 2):
        found[f"bits-{bits}"] = {"policy": "keydiff", "budget": 12, "bits": bits, "batch": True}
    found["bits-always"] = {"policy": "keydiff", "bits": 4, **always}
    found["bits-heads"] = {"budget": 0.5, "bits": 4}
    found["bits-pair"] = {"policy": "capkv", "budget": 12, "bits": (8, 3), "allocation": "pyramid"}
    return found


def tiny(book: Book, quick: bool) -> None:
    """Tiny models of all families: every option of the cache."""
    whole, batch = prompt(61), padded(33, 52)
    variants: dict[str, Any] = {family: lambda f=family: build(f) for family in CONFIGS}
    variants |= {"llama-eager": lambda: build("llama", "eager"), "llama-bf16": lambda: build("llama").bfloat16()}
    for family, make in variants.items():
        if quick and family not in ("llama", "gemma3"):
            continue
        model = make()
        place = f"tiny/{family}"
        book.put(f"{place}/fingerprint", fingerprint(model))
        book.put(f"{place}/profile", known_profile(model))
        book.put(f"{place}/profile-calibrated", calibrated(model, tokens=64))
        book.put(f"{place}/profile-weights", profile_of_weights(model))
        for name, options in scenes().items():
            options = dict(options)
            how = {key: options.pop(key) for key in ("new", "chunk", "num_beams") if key in options}
            inputs = batch if options.pop("batch", False) else whole
            try:
                cache = make_cache(model, **options)
            except (ValueError, ImportError) as error:
                book.refused.append(f"{place}/{name}: {error}")
                book.put(f"{place}/{name}/refused", "ImportError" if isinstance(error, ImportError) else "ValueError")
                continue
            scene(book, f"{place}/{name}", model, cache, inputs, **how)
        together(book, f"{place}/together", model)


def together(book: Book, place: str, model: Any) -> None:
    """One prefill for several caches, rows of one batch, copies, rows that change places."""
    for share in (False, True):
        caches = [make_cache(model, name, 0.4) for name in policies(replay=False)]
        book.put(f"{place}/{share}/logits", prefill_together(model, prompt(50), caches, share))
        for name, cache in zip(policies(replay=False), caches, strict=True):
            state(book, f"{place}/{share}/{name}", cache)
    joined = as_rows([copied(cache) for cache in caches])
    later = prompt(6, seed=4)["input_ids"].expand(len(caches), -1)
    with torch.no_grad():
        book.put(f"{place}/rows", model(later, past_key_values=joined).logits)
    for name, cache in zip(policies(replay=False), caches, strict=True):
        book.put(f"{place}/untouched/{name}", [report(cache)["held"], report(copied(cache))["held"]])
    for name in ("capkv", DEFAULT):
        cache = make_cache(model, name, 0.5)
        with torch.no_grad():
            model(**padded(17, 29), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 1]))
        state(book, f"{place}/moved-{name}", cache)


def saved(book: Book, quick: bool) -> None:
    """Save caches, load them and go on."""
    moving = compose(weight_parts()["expected-moving"], direction_parts()["value"], estimator_parts()["leverage"])
    always = {"evict": "always", "interval": 3}
    kinds: dict[str, dict[str, Any]] = {
        "default": {},
        "equal": {"policy": "capkv"},
        "h2o-always": {"policy": "h2o", **always},
        "moving": {"policy": moving, "positions": "compact", **always},
        **{f"split-{split}": {"policy": "capkv", "allocation": split, **always} for split in allocations()},
    }
    with tempfile.TemporaryDirectory() as folder:
        for family in ("llama", "gemma3"):
            model = build(family)
            for name, options in kinds.items():
                cache = make_cache(model, budget=14, **options)
                inputs = padded(22, 40)
                with torch.no_grad():
                    model(**inputs, past_key_values=cache)
                file = save(cache, model, Path(folder) / f"{family}-{name}.safetensors")
                loaded = restore(file, model, options["policy"] if options.get("policy") is moving else None)
                place = f"saved/{family}/{name}"
                state(book, f"{place}/loaded", loaded)
                grown = {key: torch.cat((x, x[:, -5:].flip(1)), 1) for key, x in inputs.items()}
                scene(book, f"{place}/after", model, loaded, grown, new=8)


def studies(book: Book, quick: bool) -> None:
    """Tasks, and short comparisons and searches on a tiny model in a folder."""
    reader = byte_tokenizer()
    for task in task_names():
        for seed in (0, 1):
            made = example(task, reader, 700, seed)
            book.put(f"studies/task/{task}/{seed}", example_texts(made, reader))
    model = build("llama", vocab_size=400, max_position_embeddings=1024, seed=3)
    pairs = [
        ("The parrot is called Otto and the cat is called Mia. " * 3, "What is the cat called?"),
        ("Water boils sooner on a mountain, since the air is thinner. " * 3, "Where does it boil sooner?"),
        ("Anna was born in Vienna, Peter in Linz; both moved to Graz. " * 3, "Where was Anna born?"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reader.save_pretrained(folder)
        book.put("studies/comparison", comparison(folder))
        book.put("studies/tuned-kl", tuned(folder, pairs, target_kl=2.0))
        book.put("studies/tuned-agreement", tuned(folder, pairs, target_agreement=0.4, mode="agnostic"))
    book.put("studies/demonstration", demonstration(model, reader))
    book.put("studies/calibrated", calibrated(model, reader, tokens=80))
    for name, options in {
        "plain": {},
        "agnostic": {"aware": False},
        "chunks": {"aware": False, "chunk": 20, "interval": 6, "positions": "compact", "allocation": "pooled"},
    }.items():
        found = answer(model, reader, *pairs[0], budget=40, max_new_tokens=8, **options)
        book.put(f"studies/answer/{name}", found)


def default(book: Book, quick: bool) -> None:
    """Put the default model: every policy on a document, the default at three budgets in three modes."""
    model, reader = load_default()
    book.put("default/fingerprint", fingerprint(model))
    book.put("default/profile", known_profile(model))
    book.put("default/profile-weights", profile_of_weights(model))
    asked, text = example("multikey", reader, 420, 1), example("text", reader, 400, 1)
    cells = [(name, 0.25, None) for name in ([DEFAULT, "h2o"] if quick else policies(replay=False))]
    mine = [(DEFAULT, budget, None) for budget in (0.5, 0.1)]
    splits = [("capkv", 0.25, split) for split in allocations()]
    modes = {"agnostic": (asked, cells + mine + ([] if quick else splits), {"measure_capacity": True})}
    if not quick:
        modes["aware"] = (asked, [cells[0], *mine], {"greedy_tokens": 6})
        modes["continuation"] = (text, [cells[0], *mine], {})
    for mode, (given, tried, more) in modes.items():
        found = closeness(model, reader, given, tried, mode=mode, answer=False, **more)
        for cell, row in zip([("whole", 1.0, None), *tried], found, strict=True):
            book.put(f"default/{mode}/{'|'.join(map(str, cell))}", row)
        caches = [make_cache(model, p, b, measure_capacity=False, allocation=a) for p, b, a in tried]
        ids = document_ids(given, reader, mode == "aware")
        book.put(f"default/{mode}/logits", prefill_together(model, {"input_ids": ids}, caches, share=True))
        for cell, cache in zip(tried, caches, strict=True):
            for layer, positions in kept(cache).items():
                book.held(f"default/{mode}/{'|'.join(map(str, cell))}/kept/{layer}", positions)
    if quick:
        return
    book.put("default/calibrated", calibrated(model, reader, tokens=120))
    ids = document_ids(asked, reader, True)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, options in {
        "own": {"budget": 0.25},
        "always": {"budget": 100, "evict": "always", "interval": 4, "positions": "compact", "chunk": 128},
    }.items():
        chunk = options.pop("chunk", 0)
        scene(book, f"default/scene-{name}", model, make_cache(model, **options), inputs, new=10, chunk=chunk)


def kernels(book: Book, quick: bool) -> None:
    """Put what the Triton kernels compute, through Triton's interpreter: scores, decoding, compaction."""
    names = (DEFAULT, "capkv", "capkv-spread", "capkv-window")
    with warnings.catch_warnings(), kernels_on_cpu() as asked:
        warnings.simplefilter("ignore")  # the interpreter's NumPy warns of log 0
        for case, given in fixed_cases():
            for name in names if case in ("group1", "padded", "bf16") else ():
                for step, compute in score_steps(policies()[name], given):
                    book.attempt(f"kernels/{case}/{name}/{step}", compute)
                found = choose(vary(policies()[name], allocations()["equal"]), given, 0.25)
                book.held(f"kernels/{case}/{name}/held", found)
                book.put(f"kernels/{case}/{name}/share", capacity_share(given, found))
        whole, half = build("qwen3"), build("qwen3").bfloat16()
        for label, model in ({} if quick else {"f32": whole, "bf16": half}).items():
            for name in names[:2]:
                for how, options in {
                    "once": {"budget": 0.4},
                    "always": {"budget": 16, "evict": "always", "interval": 4},
                }.items():
                    cache = make_cache(model, name, **options)
                    scene(book, f"kernels/{label}/{name}/{how}", model, cache, padded(33, 52), new=6)
        if not quick:
            book.put("kernels/asked", [count > 0 for count in asked])


PARTS: dict[str, Callable[[Book, bool], None]] = {
    "core": core, "fixed": fixed, "tiny": tiny, "saved": saved, "studies": studies, "kernels": kernels,
    "default": default,
}  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{name}\n    old {old.get(name, '(none)')}\n    new {new.get(name, '(none)')}"
        for name in sorted(old.keys() | new.keys())
        if (name in old) != (name in new) or old[name] != new[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--write", type=Path, metavar="FILE.json", help="compute and store")
    goal.add_argument("--check", type=Path, metavar="FILE.json", help="compute again and compare")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=str([*PARTS])
    )
    parser.add_argument("--quick", action="store_true", help="a part of each part, under a minute")
    parser.add_argument("--refused", action="store_true", help="list what the library refuses, with its words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    about = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    print(f"suffice from {suffice.__file__}, {about}")
    book = Book()
    with tempfile.TemporaryDirectory() as folder:
        isolate(Path(folder))
        for part in options.only:
            start, before = time.perf_counter(), len(book.values)
            PARTS[part](book, options.quick)
            print(f"{part}: {len(book.values) - before} values, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(book.refused)} refused by the library", *(book.refused if options.refused else ()), sep="\n  ")
    if options.write:
        options.write.write_text(json.dumps({"about": about, "values": book.values}, indent=0, sort_keys=True) + "\n")
        print(f"{len(book.values)} values stored in {options.write}")
        return
    content = json.loads(options.check.read_text())
    if content["about"] != about:
        print(f"stored with {content['about']}: numbers may differ for that alone")
    old = {name: value for name, value in content["values"].items() if name.split("/")[0] in options.only}
    if options.quick:
        old = {name: value for name, value in old.items() if name in book.values}
    found = differences(old, book.values)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(old.keys() & book.values.keys())} values compared, {len(found)} differ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
