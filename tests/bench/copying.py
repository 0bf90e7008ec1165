"""bench.traffic, of a kernel that reads x as often as the first argument says, adds a bias, and writes y."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from bench import traffic
from bench.counting import counting
from loretta_kernels._triton import launch
from loretta_kernels._triton.launch import Launch

FEATURES, BLOCK_N = 64, 16


@triton.jit
def _copying_kernel(
    x_ptr, bias_ptr, y_ptr, sums_ptr, READS: tl.constexpr, BLOCK_N: tl.constexpr, FEATURES: tl.constexpr
):
    """y = x + b, and a sum that only the first program adds to."""
    c = tl.arange(0, FEATURES)
    offs = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None] * FEATURES + c[None, :]
    y = tl.full([BLOCK_N, FEATURES], 0, tl.float32)
    for _ in range(READS):
        y += (tl.load(x_ptr + offs) + tl.load(bias_ptr + c)[None, :]) / READS
    tl.store(y_ptr + offs, y)
    tl.atomic_add(sums_ptr, tl.sum(y), mask=tl.program_id(0) == 0)


def measure(case, reads, launches):
    """Its traffic as if it were the forward of the gated class: x and y in fp16 are compulsory."""
    counts = []
    for N in (2 * BLOCK_N, 4 * BLOCK_N):
        x = torch.randn(N, FEATURES).half()
        args = {"x_ptr": x, "bias_ptr": torch.ones(FEATURES), "y_ptr": x.clone(), "sums_ptr": torch.zeros(1)}
        constants = {"READS": reads, "BLOCK_N": BLOCK_N, "FEATURES": FEATURES}
        with counting() as counters:
            for _ in range(launches):
                launch.execute(Launch(_copying_kernel, (N // BLOCK_N,), args, constants, 4, 1))
        counts.append(counters)
    return [traffic.compare(case, "forward", (2 * BLOCK_N, 4 * BLOCK_N), *counts, compulsory=2 * 2 * FEATURES)]


if __name__ == "__main__":
    reads, launches = int(sys.argv[1]), len(sys.argv) - 1
    argv = ["--classes", traffic.GATED, "--json"]
    sys.exit(traffic.main(argv, measure=lambda case: measure(case, reads, launches)))
