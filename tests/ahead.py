"""Compiles every kernel for an H100 (sm_90) down to machine code, which needs no GPU; prints what it compiled.

Run as a script: the interpreter, which the tests use, accepts what the compiler does not.
"""

import dataclasses
import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from retain.kv.kernels.compaction import move_to_front
from retain.kv.kernels.decoding import Plan, decode
from retain.kv.kernels.leverage import factorize, inner_products, part_factor
from retain.kv.kernels.observation import Observation, Terms, observed_log_weights
from retain.link.kernels.least import least
from retain.link.kernels.matching import matching


def main(dim: int, dtype: torch.dtype) -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        print(self.__name__)

    JITFunction.run = compile_only
    keys = torch.zeros(1, 2, 512, dim, dtype=dtype)
    starts, ends = torch.zeros(1, 2, dtype=torch.int32), torch.full((1, 2, 16), 512, dtype=torch.int32)
    seen = Observation(keys.repeat(1, 4, 1, 1), keys, 0.1, 16, 512, torch.zeros(1, dtype=torch.int32), starts, ends)
    observed_log_weights(seen, Terms(5, 4.0, 1.0, 1.0, 2.0))
    sampled, more = torch.zeros(1, 8, dtype=torch.long), torch.full((1, 2, 24), 512, dtype=torch.int32)
    seen = dataclasses.replace(seen, ends=more, sampled=sampled, inner=starts)
    observed_log_weights(seen, Terms(1, 4.0, 3.0, 1.0, 1.0))
    weights = torch.zeros(1, 2, 512)
    factor = factorize(keys, weights, 0.1)
    inner_products(keys, weights, factor)
    part_factor(keys, weights, torch.zeros(1, 2, 9, dtype=torch.long), factor)
    plan = Plan.of([(0, 400), (404, 600)], 4, torch.device("cpu"))
    entries, positions = keys.view(-1, dim), torch.zeros(1, 4, dtype=torch.int32)
    decode(torch.zeros(1, 8, dim, dtype=dtype), entries, entries, positions, plan, 0.1)
    move_to_front(keys, torch.zeros(1, 2, 9, dtype=torch.long))
    numbers = torch.zeros(8, dtype=torch.long)
    matching(numbers, numbers, numbers, numbers, common=True)
    matching(numbers, numbers, numbers, numbers, common=False)
    least(numbers, numbers, torch.zeros(8, 128))


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
