"""Caches that use kernels, run by Triton's interpreter; the oracle is the same cache without kernels."""

import pytest
import torch

pytest.importorskip("triton")

from suffice.gpu import disable_kernels, kernels_enabled
from suffice.kv import CompressedCache
from suffice.kv.cache.prefill import prefill
from suffice.kv.kernels import compaction
from tests.kv.tiny import answer, build, left_padded, prompt

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch):
    """Let caches use kernels for tensors on the CPU, except within `disable_kernels`."""
    for name in ("suffice.kv.backend.triton_backend.can_use_kernels", "suffice.kv.storage.uniform.usable"):
        monkeypatch.setattr(name, lambda *tensors: kernels_enabled())


def assert_same_cache(cache, expected):
    for layer in expected.compressed_layers:
        assert torch.equal(cache.kept_positions(layer.index), expected.kept_positions(layer.index))
    for head, expected_head in zip(cache.report().heads, expected.report().heads, strict=True):
        assert head.capacity_retained == pytest.approx(expected_head.capacity_retained, abs=1e-4)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("capkv-profile", {}),
        ("capkv", {"evict": "always", "interval": 2}),
        ("capkv", {"evict": "always", "interval": 2, "rerotate": True}),
    ],
)
def test_cache_with_kernels_equals_cache_without(monkeypatch, policy, options):
    model, inputs = (
        build("qwen3", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        left_padded([prompt(24), prompt(15)]),
    )
    moves, move_to_front = [], compaction.move_to_front
    monkeypatch.setattr(compaction, "move_to_front", lambda *arguments: moves.append(move_to_front(*arguments)))
    cache, expected = (CompressedCache(model, policy, 12, **options) for _ in range(2))
    with disable_kernels():
        expected_tokens = answer(model, inputs, expected, new=4)
    assert not moves
    assert torch.equal(answer(model, inputs, cache, new=4), expected_tokens)
    assert_same_cache(cache, expected)
    assert bool(moves) == (options == {"evict": "always", "interval": 2})


@pytest.mark.parametrize("share_statistics", [False, True])
def test_layers_with_values_of_zero_are_scored_by_torch(share_statistics):
    """Kernels are not precise enough for them, which is only known when all conditions of a layer are checked."""
    model, inputs = build("qwen3", num_hidden_layers=2, layer_types=["full_attention"] * 2), {"input_ids": prompt(24)}
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()
    caches, expected = ([CompressedCache(model, "capkv", budget) for budget in (0.4, 12)] for _ in range(2))
    with disable_kernels():
        prefill(model, inputs, expected)
    prefill(model, inputs, caches, share_statistics=share_statistics)
    for cache, expected_cache in zip(caches, expected, strict=True):
        assert_same_cache(cache, expected_cache)
        assert bool((cache.compressed_layers[1].storage.values == 0).all())
