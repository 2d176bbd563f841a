"""Compiled models: the same results, and few graphs, because the code of a cache is not compiled."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from suffice.kv import CompressedCache
from tests.kv.tiny import build, prompt


def read(forward, cache):
    """Read a prompt and 6 tokens; return the logits of each last token and the number of graphs after each pass."""
    logits, graphs = [], []
    for new in (40, 1, 1, 1, 1, 1, 1):
        logits.append(forward(prompt(new, seed=new), past_key_values=cache).logits[:, -1])
        graphs.append(counters["stats"]["unique_graphs"])
    return torch.stack(logits), graphs


@pytest.mark.parametrize(("policy", "evict"), [("capkv-profile", "prefill"), ("capkv", "always")])
def test_compiled_model_gives_the_same_logits_with_few_graphs(policy, evict):
    model = build("llama")
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        expected, _ = read(model.forward, CompressedCache(model, policy, 24, evict=evict, interval=3))
        compiled = torch.compile(model.forward, backend="eager")
        got, graphs = read(compiled, CompressedCache(model, policy, 24, evict=evict, interval=3))
    torch.testing.assert_close(got, expected)
    # The code between two attention calls is one graph, compiled for the prompt and for single tokens.
    assert graphs[-1] <= 8 * model.config.num_hidden_layers
    assert graphs[2:] == [graphs[2]] * len(graphs[2:])  # nothing is compiled again
    torch.compiler.reset()
