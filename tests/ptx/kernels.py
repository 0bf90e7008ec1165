"""Small Triton kernels, right or wrong by a constant, and how to execute them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.ptx import Executor
from loretta_kernels._triton.launch import Launch, Variant

ARCHITECTURES = ("sm_80", "sm_90")


def run(kernel, grid, tensors, constants=None, *, warps=4, stages=2, numbers=None, **options) -> Executor:
    """Execute one launch of a kernel, whose pointers are named as the tensors."""
    executor = Executor(**options)
    executor(Launch(Variant(kernel, constants or {}, warps, stages), grid, tensors | (numbers or {})))
    return executor


def unwritten(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor as the executor makes those that nobody has written to."""
    return torch.full(size, -1, dtype={2: torch.int16, 4: torch.int32}[dtype.itemsize]).view(dtype)


@triton.jit
def reversed_through_scratch(x_ptr, scratch_ptr, y_ptr, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    """y = x backwards: every thread reads what another has stored."""
    e = tl.arange(0, SIZE)
    tl.store(scratch_ptr + e, tl.load(x_ptr + e))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + e, tl.load(scratch_ptr + SIZE - 1 - e))


@triton.jit
def sum_by_the_last(
    x_ptr, planes_ptr, arrived_ptr, y_ptr, SIZE: tl.constexpr, SEM: tl.constexpr, BARRIER: tl.constexpr
):
    """y = the sum over programs of x: each stores a plane, and the last to arrive adds them."""
    program, e = tl.program_id(0), tl.arange(0, SIZE)
    tl.store(planes_ptr + program * SIZE + e, tl.load(x_ptr + program * SIZE + e))
    if BARRIER:
        tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem=SEM, scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        sums = tl.full([SIZE], 0, tl.float32)
        for other in range(tl.num_programs(0)):
            sums += tl.load(planes_ptr + other * SIZE + e)
        tl.store(y_ptr + e, sums)
        tl.store(arrived_ptr, 0)


@triton.jit
def masked_copy(x_ptr, y_ptr, N, SIZE: tl.constexpr, LOADS: tl.constexpr, STORES: tl.constexpr):
    """y = x, of N elements; LOADS and STORES more of them than there are."""
    e = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + e, tl.load(x_ptr + e, mask=e < N + LOADS, other=0.0), mask=e < N + STORES)


@triton.jit
def add_up(x_ptr, sum_ptr, SIZE: tl.constexpr, ATOMIC: tl.constexpr):
    """sum += x of every program, by atomics or by load and store."""
    e = tl.arange(0, SIZE)
    x = tl.load(x_ptr + tl.program_id(0) * SIZE + e)
    if ATOMIC:
        tl.atomic_add(sum_ptr + e, x, sem="relaxed")
    else:
        tl.store(sum_ptr + e, tl.load(sum_ptr + e) + x)


@triton.jit
def wait_for_a_flag(flag_ptr):
    """Spins until somebody raises a flag."""
    while tl.atomic_add(flag_ptr, 0) == 0:
        pass


@triton.jit
def product(
    a_ptr,
    b_ptr,
    c_ptr,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """c [BM, BN] = a [BM, K] · b [K, BN]; or with b stored as [BN, K]."""
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    acc = tl.full([BM, BN], 0, tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(a_ptr + m * K + k[None, :], mask=k[None, :] < K, other=0.0)
        if TRANSPOSED:
            b = tl.trans(tl.load(b_ptr + tl.arange(0, BN)[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0))
        else:
            b = tl.load(b_ptr + k[:, None] * BN + n, mask=k[:, None] < K, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + m * BN + n, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def chained(a_ptr, b_ptr, d_ptr, c_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """c = tanh-like (a · b) · d, all [SIZE, SIZE]: a product whose operand comes from registers."""
    e = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    h = tl.dot(tl.load(a_ptr + e), tl.load(b_ptr + e), input_precision=PRECISION)
    h = h * tl.sigmoid(h)
    tl.store(c_ptr + e, tl.dot(h.to(a_ptr.dtype.element_ty), tl.load(d_ptr + e), input_precision=PRECISION))


@triton.jit
def reductions(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = (sum, max, sums so far) of every row of x."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + r[:, None] * COLUMNS + c[None, :])
    tl.store(y_ptr + r, tl.sum(x, 1))
    tl.store(y_ptr + ROWS + r, tl.max(x, 1))
    tl.store(y_ptr + 2 * ROWS + r[:, None] * COLUMNS + c[None, :], tl.cumsum(x, 1))


@triton.jit
def atomics(x_ptr, int_ptr, wide_ptr, half_ptr, SIZE: tl.constexpr):
    """Every kind of atomic that Triton has, on one element each."""
    e = tl.arange(0, SIZE)
    x = tl.load(x_ptr + e)
    zero = e * 0
    tl.atomic_add(int_ptr + zero, x)
    tl.atomic_max(int_ptr + 1 + zero, x)
    tl.atomic_min(int_ptr + 2 + zero, x)
    tl.atomic_and(int_ptr + 3 + zero, x)
    tl.atomic_or(int_ptr + 4 + zero, x)
    tl.atomic_xor(int_ptr + 5 + zero, x)
    tl.atomic_xchg(int_ptr + 6 + zero, zero + 7)
    tl.atomic_cas(int_ptr + 7, 11, 12)
    tl.atomic_add(wide_ptr + zero, x.to(tl.int64) << 33)
    tl.atomic_add(half_ptr + zero, (x % 3).to(half_ptr.dtype.element_ty))
