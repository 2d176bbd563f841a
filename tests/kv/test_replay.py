"""Policies that score the entries of a prompt in a second pass, in which the model repeats the prompt."""

import gc

import pytest
import torch
import transformers
from transformers import DynamicCache

from suffice.kv import CompressedCache, Policy, policies, prefill
from suffice.kv.budget.allocation import HighestReplayScores
from suffice.kv.cache import replay
from suffice.kv.cache.replay_prompt import Instruction, replay_inputs
from suffice.kv.hf.layers import caches_latents, compressed_layers
from suffice.kv.policy.weights import KINDS, ReplayAttention
from tests.kv.families import build as build_family
from tests.kv.family_cases import get_case
from tests.kv.test_layers import has_layers_of_many_kinds
from tests.kv.tiny import answer, build, left_padded, prompt, tiny, tokenizer

PUBLISHED = {"kvzip": "largest", "kvzip+": "output", "kvgrad": "gradient"}
REPLAY = tuple(policies(replay=True))


def fill(model, name, budget, inputs, **options):
    """Return a cache of a prompt."""
    names = ("tokenizer", "chunk_size")
    cache = CompressedCache(model, name, budget, **{k: v for k, v in options.items() if k not in names})
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    prefill(model, inputs, [cache], **{k: v for k, v in options.items() if k in names})
    return cache


def kept(cache):
    """Return which tokens each head keeps, bool [layers, heads, tokens], of the only row."""
    masks = []
    for layer in cache.compressed_layers:
        positions = cache.kept_positions(layer.index)[0]
        mask = torch.zeros(len(positions), layer.state.num_seen + 1, dtype=torch.bool)
        masks.append(mask.scatter_(1, positions.long().where(positions >= 0, layer.state.num_seen), True)[:, :-1])
    return torch.stack(masks)


def head_values(module, hidden):
    """Return the values that a module computes from its input for each query head, [tokens, heads, value_dim]."""
    if hasattr(module, "kv_b_proj"):
        latents = module.kv_a_layernorm(module.kv_a_proj_with_mqa(hidden)[..., : module.kv_lora_rank])
        heads = module.kv_b_proj(latents).unflatten(-1, (-1, module.qk_nope_head_dim + module.v_head_dim))
        return heads[..., module.qk_nope_head_dim :]
    values = module.v_proj(hidden).unflatten(-1, (-1, module.head_dim))
    return values.repeat_interleave(module.num_key_value_groups, 1)


def dense_scores(model, ids, start, end, kind, last_layer=None):
    """Return scores from the attention matrices of one pass over a prompt and a part of it, [layers, heads, part].

    Of the prompt, the repeated tokens read the first four and the part only, in the scores but not in the model.
    """
    num, part = ids.shape[1], ids[:, start:end]
    modules = list(compressed_layers(model).values())
    inputs, outputs, last = {}, {}, []
    hooks = [
        module.register_forward_pre_hook(
            lambda own, args, kwargs: inputs.update({own: kwargs["hidden_states"]}), with_kwargs=True
        )
        for module in modules
    ]
    hooks += [module.register_forward_hook(lambda own, args, out: outputs.update({own: out[0]})) for module in modules]
    last_layer = model.model.layers[-1] if last_layer is None else last_layer
    hooks.append(last_layer.register_forward_hook(lambda own, args, out: last.append(out)))
    embeds = model.get_input_embeddings()(torch.cat((ids, part), 1)).detach().requires_grad_(True)
    attention = model(inputs_embeds=embeds, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    objective = last[0][:, num:].square().sum()
    gradients = torch.autograd.grad(objective, [outputs[module] for module in modules])
    scores = []
    for module, weights, gradient in zip(modules, attention, gradients, strict=True):
        weights = weights[0, :, num:].detach()  # [heads, queries, tokens]
        read = torch.zeros(weights.shape[-1], dtype=torch.bool)
        read[:4] = read[start:end] = read[num:] = True
        weights = weights * read
        weights = (weights / weights.sum(-1, keepdim=True))[..., start:end]
        if kind != "largest":
            # The values that the module computes from its input, and its output projection, head by head.
            values = head_values(module, inputs[module][0, start:end])
            columns = module.o_proj.weight.unflatten(1, (values.shape[1], -1))
            norms = torch.einsum("thd,ohd->hto", values, columns).norm(dim=-1)
            factor = 1 / inputs[module][0, num:].norm(dim=-1) if kind == "output" else gradient[0, num:].norm(dim=-1)
            weights = weights * norms[:, None] * factor[:, None]
        # All heads share one latent; they share keys and values in groups otherwise.
        group = len(weights) if hasattr(module, "kv_b_proj") else module.num_key_value_groups
        scores.append(weights.amax(1).unflatten(0, (-1, group)).amax(1))
    return torch.stack(scores).detach()


@pytest.mark.parametrize("part_size", [100, 16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_kept_entries_are_those_with_the_highest_scores_of_the_whole_model(name, part_size, monkeypatch):
    monkeypatch.setattr(replay, "_PART_SIZE", part_size)
    monkeypatch.setattr(replay, "_PART_SIZE_OF_GRADIENT", part_size)
    model, ids = tiny("llama", "eager"), prompt(40)
    parts = [
        dense_scores(model, ids, start, min(start + part_size, 40), PUBLISHED[name])
        for start in range(0, 40, part_size)
    ]
    scores = torch.cat(parts, -1)
    scores[..., :4] = torch.inf
    cache = fill(model, name, 0.25, ids)
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[scores.flatten().topk(10 * 6).indices] = True
    assert torch.equal(kept(cache).flatten(), expected)


def test_gradients_are_those_of_the_last_layer_that_runs():
    """Without an image, Llama 3.2 Vision skips the layers that read images, here the last one."""
    model, ids = build_family("mllama"), prompt(40)
    model.set_attn_implementation("eager")
    layers = model.model.language_model.layers
    assert hasattr(layers[-1], "cross_attn")
    scores = dense_scores(model, ids, 0, 40, "gradient", last_layer=layers[-2])
    scores[..., :4] = torch.inf
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[scores.flatten().topk(10 * scores.shape[0] * scores.shape[1]).indices] = True
    assert torch.equal(kept(fill(model, "kvgrad", 0.25, ids)).flatten(), expected)


@pytest.mark.skipif(not has_layers_of_many_kinds(), reason="early versions cache the keys of all heads")
@pytest.mark.parametrize("name", PUBLISHED)
def test_kept_latents_are_those_with_the_highest_scores_of_all_heads(name):
    """Latents need an allocation with a budget for each layer. Gradients are known when the pass has ended."""
    model, ids = build_family("deepseek_v3"), prompt(40)
    model.set_attn_implementation("eager")
    assert all(map(caches_latents, compressed_layers(model).values()))
    scores = dense_scores(model, ids, 0, 40, PUBLISHED[name])
    scores[..., :4] = torch.inf
    cache = fill(model, name, 0.25, ids, allocation="equal")
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(10).indices, True)
    assert torch.equal(kept(cache), expected)


@pytest.mark.parametrize("name", REPLAY)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_later_tokens_read_what_is_kept(family, name):
    model, ids, rest = tiny(family), prompt(60), prompt(5, seed=1)
    with torch.no_grad():
        cache = fill(model, name, 1.0, ids)
        stock = DynamicCache(config=model.config)
        model(ids, past_key_values=stock)
        torch.testing.assert_close(
            model(rest, past_key_values=cache).logits, model(rest, past_key_values=stock).logits, rtol=1e-4, atol=1e-4
        )
    assert fill(model, name, 0.25, ids).report().tokens_kept == 15


@pytest.mark.parametrize("name", REPLAY)
@pytest.mark.parametrize("chat", [False, True])
def test_rows_of_a_padded_batch_equal_single_rows(name, chat):
    model = build("llama", vocab_size=400)
    prompts = [prompt(50), prompt(37), prompt(20)]
    batch = fill(model, name, 0.4, left_padded(prompts), tokenizer=tokenizer(chat))
    for row, ids in enumerate(prompts):
        alone = fill(model, name, 0.4, ids, tokenizer=tokenizer(chat))
        for layer in alone.compressed_layers:
            for head, expected in enumerate(alone.kept_positions(layer.index)[0].tolist()):
                got = batch.kept_positions(layer.index)[row, head].tolist()
                assert [x for x in got if x >= 0] == [x for x in expected if x >= 0]


@pytest.mark.parametrize("part_size", [7, 16])
def test_rows_of_a_padded_batch_equal_single_rows_in_parts(part_size, monkeypatch):
    # Rows begin at different tokens of the batch, so the parts of a row alone begin at other tokens.
    monkeypatch.setattr(replay, "_PART_SIZE", part_size)
    model = tiny("llama")
    prompts = [prompt(48), prompt(48 - 2 * part_size)]
    batch = fill(model, "kvzip", 0.4, left_padded(prompts))
    for row, ids in enumerate(prompts):
        alone = fill(model, "kvzip", 0.4, ids)
        for layer in alone.compressed_layers:
            for head, expected in enumerate(alone.kept_positions(layer.index)[0].tolist()):
                got = batch.kept_positions(layer.index)[row, head].tolist()
                assert [x for x in got if x >= 0] == [x for x in expected if x >= 0]


@pytest.mark.parametrize("name", REPLAY)
def test_a_prompt_in_chunks_keeps_the_same_entries(name):
    model, ids = tiny("llama"), prompt(60)
    assert torch.equal(kept(fill(model, name, 0.3, ids, chunk_size=17)), kept(fill(model, name, 0.3, ids)))


def test_one_prefill_fills_caches_with_and_without_a_replay():
    model, ids = tiny("gemma3"), prompt(50)
    names = ("kvgrad", "h2o", "kvzip", "full")
    caches = [CompressedCache(model, name, 0.5) for name in names]
    result = prefill(model, {"input_ids": ids}, caches, tokenizer=None, share_statistics=True)
    assert len(result.seconds) == 4
    for name, cache in zip(names, caches, strict=True):
        alone = fill(model, name, 0.5, ids)
        for layer in cache.compressed_layers:
            assert torch.equal(cache.kept_positions(layer.index), alone.kept_positions(layer.index))
        inputs = {"input_ids": torch.cat((ids, prompt(3, seed=2)), 1)}
        assert torch.equal(answer(model, inputs, cache.copy()), answer(model, inputs, alone.copy()))
    torch.testing.assert_close(result.logits, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"bits": (5, 4)}, {"memory": 0.5}, {"allocation": "equal"}, {"allocation": "adakv"}]
)
def test_other_storages_and_allocations(options):
    model, ids = tiny("llama"), prompt(90)
    budget = None if "memory" in options else 0.4
    cache = fill(model, "kvzip", budget, ids, **options)
    report = cache.report()
    if "memory" in options:
        assert report.bytes_kept + report.bytes_index <= report.bytes_limit
    else:
        assert report.tokens_kept == 36
    with torch.no_grad():
        assert model(prompt(3, seed=4), past_key_values=cache).logits.isfinite().all()


def test_a_policy_may_take_its_budgets_from_a_replay_and_its_scores_from_the_prompt():
    model, ids = tiny("llama"), prompt(60)
    mixed = Policy(policies()["capkv"].weights, allocation=HighestReplayScores(safeguard=0.2))
    counts = [
        [head.tokens_kept for head in fill(model, policy, 0.3, ids, window=0).report().heads]
        for policy in (mixed, "kvzip")
    ]
    assert sum(counts[0]) == sum(counts[1]) == 18 * 6
    assert counts[0] != [18] * 6


@pytest.mark.parametrize("name", PUBLISHED)
def test_memory_of_evicted_entries_is_freed(name):
    def full_tensors():
        return [
            x
            for x in gc.get_objects()
            if type(x) is torch.Tensor and x.dim() == 4 and x.shape[1] == 2 and x.shape[2] >= 80
        ]

    model, ids = tiny("llama"), prompt(80)
    gc.collect()
    of_other_tests = full_tensors()  # the list keeps them alive, so that no new tensor has the identity of one
    known = set(map(id, of_other_tests))
    cache = fill(model, name, 0.25, ids)
    gc.collect()
    assert not [x for x in full_tensors() if id(x) not in known]
    assert cache.report().bytes_kept == cache.report().bytes_full / 4


def test_the_model_is_as_before():
    model, ids = build("llama"), prompt(30)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            cache = fill(model, "kvgrad", 0.5, ids)
    del cache
    gc.collect()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_results_do_not_depend_on_the_gradient_mode():
    model, ids = tiny("llama"), prompt(40)
    masks = []
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            masks.append(kept(fill(model, "kvgrad", 0.5, ids)))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_failure_leaves_the_caches_empty(monkeypatch):
    model, ids = tiny("llama"), prompt(40)
    caches = [CompressedCache(model, name, 0.5) for name in ("h2o", "kvzip")]
    # The attention of the second layer of the replay fails.
    module, calls = model.model.layers[1].self_attn, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more memory")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        prefill(model, {"input_ids": ids}, caches)
    hook.remove()
    assert [cache.get_seq_length() for cache in caches] == [0, 0]
    prefill(model, {"input_ids": ids}, caches)
    assert torch.equal(kept(caches[1]), kept(fill(model, "kvzip", 0.5, ids)))


def test_instruction_quotes_the_words_before_a_part():
    model, own = build("llama", vocab_size=400, max_position_embeddings=2048), tokenizer(True)
    ids = own("one two three four five six seven eight nine ten " * 20, return_tensors="pt").input_ids
    instruction = Instruction.from_tokenizer(own)
    first, second, *_ = replay_inputs(model, ids, instruction, 40)
    assert own.decode(first.ids[0, : first.num_instruction]).startswith("\n\nRepeat the previous context exactly.")
    words = own.decode(ids[0, 32:40])
    text = own.decode(second.ids[0, : second.num_instruction])
    assert text.startswith("\n\nRepeat the part of the previous context exactly, starting with" + words)
    for part in (first, second):
        assert torch.equal(part.ids[:, part.num_instruction :], ids[:, part.start : part.end])


def test_parts_are_shorter_where_the_context_window_leaves_less_room():
    model = build("llama", max_position_embeddings=200)
    parts = replay_inputs(model, torch.ones(1, 130, dtype=torch.long), Instruction(), 2048)
    assert [part.end - part.start for part in parts] == [70, 60]


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPLAY)
def test_a_prefill_in_one_pass_is_refused(name):
    model = tiny("llama")
    cache = CompressedCache(model, name, 0.5)
    with pytest.raises(ValueError, match=r"past_key_values must be filled by suffice.kv.prefill.*got an empty cache"):
        model.generate(prompt(20), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 0
    prefill(model, {"input_ids": prompt(20)}, [cache])
    assert cache.get_seq_length() == 20


def test_refused_arguments():
    model, ids = tiny("llama"), prompt(20)
    with pytest.raises(ValueError, match=r"evict must be 'prefill' or None with policy 'kvzip'.*got 'always'"):
        CompressedCache(model, "kvzip", evict="always")
    with pytest.raises(ValueError, match=r"chunk_size must be None for policies without a replay \('h2o'\), got 5"):
        prefill(model, {"input_ids": ids}, [CompressedCache(model, "h2o")], chunk_size=5)
    with pytest.raises(ValueError, match="chunk_size must be at least 1 token, got 0"):
        prefill(model, {"input_ids": ids}, [CompressedCache(model, "kvzip")], chunk_size=0)
    with pytest.raises(ValueError, match="inputs must have input_ids, which a replay repeats, got none"):
        prefill(model, {"inputs_embeds": torch.zeros(1, 20, 48)}, [CompressedCache(model, "kvzip")])
    with pytest.raises(ValueError, match=r"inputs must be input_ids and attention_mask.*got position_ids too"):
        prefill(model, {"input_ids": ids, "position_ids": torch.arange(20)[None]}, [CompressedCache(model, "kvzip")])
    with pytest.raises(ValueError, match="kind must be one of largest, output, gradient, mean, got 'most'"):
        ReplayAttention("most")


def test_refused_models():
    sliding = build("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="budget of its own"):
        CompressedCache(sliding, "kvzip")
    with pytest.raises(ValueError, match="all of whose layers have a sliding window, got one that needs a replay"):
        prefill(sliding, {"input_ids": prompt(20)}, [CompressedCache(sliding, "kvzip", allocation="equal")])
    short = build("llama", max_position_embeddings=100)
    with pytest.raises(ValueError, match=r"inputs must have at most 36 tokens for a policy with.*100 tokens, got 70"):
        prefill(short, {"input_ids": prompt(70)}, [CompressedCache(short, "kvzip")])
    assert CompressedCache(short, "kvzip").get_seq_length() == 0
    encoder = get_case("bart").model
    with pytest.raises(ValueError, match="got BartForConditionalGeneration, an encoder-decoder model"):
        prefill(encoder, {"input_ids": prompt(20)}, [CompressedCache(encoder, "kvzip")])


def test_all_kinds_can_be_weights():
    model, ids = tiny("llama"), prompt(40)
    masks = {kind: kept(fill(model, Policy(ReplayAttention(kind)), 0.25, ids)) for kind in KINDS}
    assert all(mask.sum() == 10 * 6 for mask in masks.values())
    assert not torch.equal(masks["largest"], masks["mean"])


def test_missing_scores_are_named():
    model, ids = tiny("llama"), prompt(20)
    cache = fill(model, "kvzip", 0.5, ids)
    from suffice.kv.policy.attention_stats import AttentionStats

    stats = AttentionStats(torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
    with pytest.raises(
        ValueError, match="replay_scores must have the kind 'largest', which the policy needs, got none"
    ):
        cache.policy.score(stats)


def test_a_model_that_multiplies_its_embeddings_in_place_can_be_replayed_with_gradients():
    """Autograd does not allow this for an input of the graph, as which the embeddings serve."""
    if transformers.__version__.startswith("5.2."):
        pytest.skip("needs a newer transformers, whose CTRL calls its attention interface")
    case = get_case("ctrl")
    # The error comes after the gradients: the scores also need a projection, which this model does not have.
    with pytest.raises(ValueError, match="no linear layer named"):
        fill(case.model, "kvgrad", 0.5, case.prompt())
