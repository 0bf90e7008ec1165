"""The way back from the gradient of a side to those of its cores, and of a bias: by one program, once.

Of a chain P = G1 ··· Gp, one core after the other from the last, as in `_torch.train`:

    dGj = (G1 ··· G(j-1))ᵀ · d        d <- d · Gjᵀ
"""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import cast, dot
from loretta_kernels._triton.tiles import TABLE_BLOCK, store_partials


@triton.jit
def _matmul(
    out_ptr,
    a_ptr,
    b_ptr,
    factor,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    stride_am: tl.constexpr,
    stride_ak: tl.constexpr,
    stride_bk: tl.constexpr,
    stride_bn: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [M, N] = factor · a [M, K] · b [K, N], by one program."""
    for tile in range(tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)):
        m = tile // tl.cdiv(N, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a_ok, b_ok = (m < M)[:, None] & (k < K)[None, :], (k < K)[:, None] & (n < N)[None, :]
            a = tl.load(a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak, mask=a_ok, other=0.0)
            b = tl.load(b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=b_ok, other=0.0)
            acc = dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
        ok = (m < M)[:, None] & (n < N)[None, :]
        tl.store(out_ptr + m[:, None] * N + n[None, :], cast(acc * factor, out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _core_grad(
    dcores_ptr, scratch_ptr, d_ptr, cores_ptr, partial_ptr, factor, S: tl.constexpr, J: tl.constexpr, P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dGj = factor · partialᵀ · d, and d · Gjᵀ into the scratch."""
    ROWS: tl.constexpr = S.chain_rows[J]
    R: tl.constexpr = S.ranks[J]
    C: tl.constexpr = S.columns[J]
    B: tl.constexpr = 32 if P == "tf32x3" else 64  # three products at once need the registers
    COLUMNS: tl.constexpr = min(B, BLOCK_C)
    _matmul(dcores_ptr + S.core_starts[J], partial_ptr, d_ptr, factor, R, C, ROWS, 1, R, C, 1, P, 16, COLUMNS, B)
    _matmul(
        scratch_ptr + S.chain_grads[J], d_ptr, cores_ptr + S.core_starts[J], 1.0, ROWS, R, C, C, 1, 1, C, P, B, 16, B
    )
    tl.debug_barrier()


@triton.jit
def store_core_grads(
    dcores_ptr, grads_ptr, scratch_ptr, cores_ptr, factor, S: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr = 64
):
    """The gradients of a side's cores, times a factor, from the summed gradient of the side; by one program."""
    factor *= S.factor
    store_partials(scratch_ptr, tl.constexpr(S.chain_partials), cores_ptr, S, 0, S.count)
    COUNT: tl.constexpr = S.count
    for step in tl.static_range(1, COUNT):
        if step == 1:
            d_ptr = grads_ptr + S.grad
        else:
            d_ptr = scratch_ptr + S.chain_grads[COUNT - step + 1]
        if COUNT - step == 1:
            partial_ptr = cores_ptr + S.core_starts[0]
            _core_grad(dcores_ptr, scratch_ptr, d_ptr, cores_ptr, partial_ptr, factor, S, COUNT - step, P, BLOCK_C)
        else:
            partial_ptr = scratch_ptr + S.chain_partials[COUNT - step - 1]
            _core_grad(dcores_ptr, scratch_ptr, d_ptr, cores_ptr, partial_ptr, factor, S, COUNT - step, P, BLOCK_C)
    first_ptr = grads_ptr + S.grad if S.count == 1 else scratch_ptr + S.chain_grads[1]
    copy(dcores_ptr + S.core_starts[0], first_ptr, factor, S.core_sizes[0])
    tl.debug_barrier()


@triton.jit
def copy(out_ptr, in_ptr, factor, SIZE: tl.constexpr):
    """out = factor · in, in out's dtype."""
    for start in range(0, SIZE, TABLE_BLOCK):
        e = start + tl.arange(0, TABLE_BLOCK)
        value = tl.load(in_ptr + e, mask=e < SIZE, other=0.0) * factor
        tl.store(out_ptr + e, cast(value, out_ptr.dtype.element_ty), mask=e < SIZE)


@triton.jit
def inner_product(a_ptr, b_ptr, SIZE: tl.constexpr):
    """<a, b>."""
    sums = tl.full([TABLE_BLOCK], 0, tl.float32)
    for start in range(0, SIZE, TABLE_BLOCK):
        e = start + tl.arange(0, TABLE_BLOCK)
        a = tl.load(a_ptr + e, mask=e < SIZE, other=0.0).to(tl.float32)
        sums += a * tl.load(b_ptr + e, mask=e < SIZE, other=0.0).to(tl.float32)
    return tl.sum(sums)


@triton.jit
def is_last(arrived_ptr, programs):
    """Whether this program is the last to come here, and so sees what all the others have written."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1.0, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == programs - 1


@triton.jit
def sum_programs(sums_ptr, grads_ptr, programs, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """This program's share of the sum of every program's `[SIZE]`, in the order of the programs."""
    e = tl.program_id(0) * TABLE_BLOCK + tl.arange(0, TABLE_BLOCK)
    sums = tl.full([TABLE_BLOCK], 0, tl.float32)
    for program in range(programs):
        sums += tl.load(grads_ptr + tl.cast(program, tl.int64) * STRIDE + e, mask=e < SIZE, other=0.0)
    tl.store(sums_ptr + e, sums, mask=e < SIZE)


def sum_blocks(size: int) -> int:
    """How many programs share a sum of this size."""
    return triton.cdiv(size, TABLE_BLOCK.value)
