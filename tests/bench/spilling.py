"""A kernel that keeps more than there are registers, in a loop, and loads x in narrow pieces."""

import torch
import triton
import triton.language as tl

from bench import resources
from bench.architectures import ARCHITECTURES
from loretta_kernels._triton.launch import Launch, Variant


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, N, SIZE: tl.constexpr):
    c = tl.arange(0, SIZE)
    sum = tl.full([SIZE], 0, tl.float32)
    product = tl.full([SIZE], 1, tl.float32)
    for row in range(N):
        x = tl.load(x_ptr + (row * SIZE + c) * 3)
        sum += x
        product *= x
    tl.store(y_ptr + c, sum * tl.sum(product))


def measure(case, arch, dtype):
    """What the kernel costs, in place of those of the class."""
    x = torch.empty(8, device="meta")
    size = 256 * ARCHITECTURES[arch].lanes  # in each of two tiles
    launch = Launch(Variant(_spilling_kernel, {"SIZE": size}, 1, 1), (1,), {"x_ptr": x, "y_ptr": x, "N": 7})
    return [resources.compiled(case, arch, dtype, 7, launch)]
