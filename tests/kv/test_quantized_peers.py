"""The ways to quantize that benchmarks/bits.py measures beside our own, compared with loops over single numbers."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "quantized_peers.py"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("quantized_peers", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def entries(tokens, *, dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Channels of very different size, and a shift, as keys have them.
    sizes = torch.logspace(-1, 1, dim)
    return torch.randn(1, 2, tokens, dim, generator=generator) * sizes + sizes


def nearest_on_grid(numbers, bits):
    """Return each number's nearest one of 2**bits numbers from the minimum to the maximum, which float16 rounds."""
    half = lambda number: float(torch.tensor(number).half())  # noqa: E731
    low, step = half(min(numbers)), half((max(numbers) - min(numbers)) / (2**bits - 1))
    grid = [low + step * code for code in range(2**bits)]
    return [min(grid, key=lambda point: abs(point - number)) for number in numbers]


def naive(cells, bits, groups):
    """Quantize the groups, lists of indices of numbers; other numbers stay as they are."""
    result = cells.clone()
    for group in groups:
        numbers = nearest_on_grid([float(cells[index]) for index in group], bits)
        for index, number in zip(group, numbers, strict=True):
            result[index] = number
    return result


def token_groups(first, stop, dim=64):
    return [
        [(0, head, token, channel) for channel in range(start, start + 32)]
        for head in range(2)
        for token in range(first, stop)
        for start in range(0, dim, 32)
    ]


def channel_groups(stop, dim=64):
    return [
        [(0, head, token, channel) for token in range(start, start + 32)]
        for head in range(2)
        for start in range(0, stop, 32)
        for channel in range(dim)
    ]


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_groups_keys_by_channel_and_values_by_token(peers, bits):
    keys, values = entries(75), entries(75, seed=1)
    found = peers.kivi(keys, values, bits)
    torch.testing.assert_close(found.keys, naive(keys, bits, channel_groups(32)))
    torch.testing.assert_close(found.values, naive(values, bits, token_groups(0, 43)))
    # Two heads: 32 keys and 43 values are quantized, each group with two numbers of 16 bits.
    quantized = 2 * (32 + 43) * 64
    assert found.num_bytes == quantized * bits / 8 + quantized / 32 * 4 + 2 * (43 + 32) * 64 * 2


@pytest.mark.parametrize("bits", [3, 8])
def test_per_token_groups_leave_the_first_and_the_last_entries(peers, bits):
    keys, values = entries(40), entries(40, seed=1)
    found = peers.per_token(keys, values, bits)
    torch.testing.assert_close(found.keys, naive(keys, bits, token_groups(4, 8)))
    torch.testing.assert_close(found.values, naive(values, bits, token_groups(4, 8)))
    quantized = 2 * 2 * 4 * 64
    assert found.num_bytes == quantized * bits / 8 + quantized / 32 * 4 + 2 * 2 * 36 * 64 * 2


def test_fp8_scales_each_vector_to_the_largest_number(peers):
    keys, values = entries(3), entries(3, seed=1)
    values[0, 0, 1] = 0
    found = peers.fp8(keys, values)
    # Every number of float8_e4m3fn, of which 0x7f and 0xff are NaN.
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    grid = codes.view(torch.float8_e4m3fn).float()
    for given, read in ((keys, found.keys), (values, found.values)):
        for vector, quantized in zip(given.flatten(0, 2), read.flatten(0, 2), strict=True):
            scale = (vector.abs().max() / 448).half().float()
            nearest = (grid * scale - vector[:, None]).abs().amin(1)
            torch.testing.assert_close((quantized - vector).abs(), nearest, atol=1e-6, rtol=1e-5)
    assert found.num_bytes == 2 * 2 * 3 * (64 + 2)


@pytest.mark.parametrize("tokens", [1, 20, 35, 36])
def test_short_prompts_stay_in_full_precision(peers, tokens):
    keys, values = entries(tokens), entries(tokens, seed=1)
    assert torch.equal(peers.per_token(keys, values, 2).keys, keys)
    assert torch.equal(peers.kivi(keys, values, 2).keys, keys)


@pytest.mark.parametrize("name", ["quanto", "hqq"])
def test_layers_of_transformers_quantize_any_number_of_tokens(peers, name):
    peer = peers.PEERS[name]
    if not peer.is_installed:
        pytest.skip(f"needs {peer.package}")
    keys, values = entries(37), entries(37, seed=1)
    found = peer.quantize(keys, values, 4)
    groups, read = keys.unflatten(-1, (-1, 64)), found.keys.unflatten(-1, (-1, 64))
    # At most one step, a 15th of the range of a group.
    assert ((read - groups).abs() <= (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15).all()
    assert found.num_bytes == 2 * keys.numel() * (4 + 0.5) / 8
