"""y = x · L · R + b through the waist s = x · L: one launch forward, one backward.

dR = sᵀ · dy      db = sum(dy)      ds = dy · Rᵀ      dL = xᵀ · ds      dx = ds · Lᵀ

Forward reads x and writes y and the waist [N, K]. Backward reads dy, then x, writes dx, and adds dL [I, K] and dR with
db [K + 1, O] to a zeroed buffer; the program that arrives last contracts them to the gradients of the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from loretta_kernels._triton import launch
from loretta_kernels._triton._common import cast, dot
from loretta_kernels._triton.core_grads import copy, store_core_grads
from loretta_kernels._triton.launch import Launch
from loretta_kernels._triton.operands import architecture, block_constants, contiguous, grads_like, needed, rows_of
from loretta_kernels._triton.plan import linear_plan
from loretta_kernels._triton.rows import block_rows, load_rows, ones_beside, store_rows
from loretta_kernels._triton.tiles import add_grad, keep_heavy, load_tile, store_tables
from loretta_kernels.shape import TTShape


@triton.jit(do_not_specialize=["N"])
def _tt_linear_fwd_kernel(
    # pointers
    x_ptr,
    y_ptr,
    waist_ptr,
    cores_ptr,
    bias_ptr,
    tables_ptr,
    # sizes and strides
    N,
    stride_xn,
    # shape
    L: tl.constexpr,
    R: tl.constexpr,
    TABLE_SIZE: tl.constexpr,
    # blocks
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of y, and of the waist, block by block."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    part, parts = tl.program_id(1), tl.num_programs(1)
    tables_ptr += (program * parts + part).to(tl.int64) * TABLE_SIZE
    store_tables(tables_ptr, cores_ptr, L)
    store_tables(tables_ptr, cores_ptr, R)
    tl.debug_barrier()
    kept = keep_heavy(tables_ptr, cores_ptr, L, BLOCK_C)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), programs, disable_licm=True):
        rows = block_rows(block, BLOCK_N)
        s = tl.full([BLOCK_N, L.KP], 0, tl.float32)
        for c0 in range(0, L.size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            x = cast(load_rows(x_ptr, rows, stride_xn, c, N, L.size), DTYPE)
            s = dot(x, cast(load_tile(tables_ptr, cores_ptr, kept, c0, L, BLOCK_C), DTYPE), s, PRECISION)
        if part == 0:
            store_rows(waist_ptr, rows, L.K, tl.arange(0, L.KP), N, L.K, s)

        s = cast(s, DTYPE)
        for c0 in range(part * BLOCK_C, R.size, parts * BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            tile = cast(load_tile(tables_ptr, cores_ptr, (), c0, R, BLOCK_C), DTYPE)
            y = dot(s, tl.trans(tile), tl.full([BLOCK_N, BLOCK_C], 0, tl.float32), PRECISION)
            if bias_ptr is not None:
                y += tl.load(bias_ptr + c, mask=c < R.size, other=0.0).to(tl.float32)[None, :]
            store_rows(y_ptr, rows, R.size, c, N, R.size, y)


@triton.jit(do_not_specialize=["N"])
def _tt_linear_bwd_kernel(
    # pointers
    dy_ptr,
    x_ptr,
    waist_ptr,
    cores_ptr,
    dx_ptr,
    dcores_ptr,
    dbias_ptr,
    tables_ptr,
    grads_ptr,
    scratch_ptr,
    # sizes and strides
    N,
    stride_dyn,
    stride_xn,
    # shape
    L: tl.constexpr,
    R: tl.constexpr,
    TABLE_SIZE: tl.constexpr,
    ARRIVED: tl.constexpr,
    # blocks
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dx block by block, the sums over rows, and at the end the gradients of the parameters."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tables_ptr += program.to(tl.int64) * TABLE_SIZE
    store_tables(tables_ptr, cores_ptr, L)
    store_tables(tables_ptr, cores_ptr, R)
    tl.debug_barrier()
    kept = keep_heavy(tables_ptr, cores_ptr, L, BLOCK_C)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), programs, disable_licm=True):
        rows = block_rows(block, BLOCK_N)
        s = load_rows(waist_ptr, rows, L.K, tl.arange(0, L.KP), N, L.K)
        s_ones = cast(ones_beside(s, R.K), DTYPE)
        ds = tl.full([BLOCK_N, L.KP], 0, tl.float32)
        for c0 in range(0, R.size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            dy = cast(load_rows(dy_ptr, rows, stride_dyn, c, N, R.size), DTYPE)
            if dx_ptr is not None or dcores_ptr is not None:
                ds = dot(dy, cast(load_tile(tables_ptr, cores_ptr, (), c0, R, BLOCK_C), DTYPE), ds, PRECISION)
            if dcores_ptr is not None or dbias_ptr is not None:
                dtile = dot(tl.trans(dy), s_ones, tl.full([BLOCK_C, R.KP], 0, tl.float32), PRECISION)
                add_grad(grads_ptr, c, dtile, R, True)

        ds = cast(ds, DTYPE)
        if dx_ptr is not None or dcores_ptr is not None:
            for c0 in range(0, L.size, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                if dcores_ptr is not None:
                    x = cast(load_rows(x_ptr, rows, stride_xn, c, N, L.size), DTYPE)
                    dtile = dot(tl.trans(x), ds, tl.full([BLOCK_C, L.KP], 0, tl.float32), PRECISION)
                    add_grad(grads_ptr, c, dtile, L, True)
                if dx_ptr is not None:
                    tile = cast(load_tile(tables_ptr, cores_ptr, kept, c0, L, BLOCK_C), DTYPE)
                    dx = dot(ds, tl.trans(tile), tl.full([BLOCK_N, BLOCK_C], 0, tl.float32), PRECISION)
                    store_rows(dx_ptr, rows, L.size, c, N, L.size, dx)

    tl.debug_barrier()
    arrived = tl.atomic_add(grads_ptr + ARRIVED, 1.0, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if arrived == programs - 1:
        if dcores_ptr is not None:
            store_core_grads(dcores_ptr, grads_ptr, scratch_ptr, cores_ptr, 1.0, L, PRECISION)
            store_core_grads(dcores_ptr, grads_ptr, scratch_ptr, cores_ptr, 1.0, R, PRECISION)
        if dbias_ptr is not None:
            copy(dbias_ptr, grads_ptr + R.grad + R.K * R.size, 1.0, R.size)


def tt_linear_fwd(x: Tensor, cores: Tensor, spec: Sequence[int], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the waist."""
    plan = linear_plan(TTShape.from_spec(tuple(spec)), x.dtype.itemsize, architecture(x.device))
    L, R = plan.sides
    rows, blocks = rows_of(x, L.size), plan.forward
    N = len(rows)
    y = x.new_empty(*x.shape[:-1], R.size)
    waist = x.new_empty(N, L.K, dtype=torch.float32)
    if N == 0:
        return y, waist
    grid = plan.programs(N, blocks), plan.parts(N, blocks)
    launch.execute(
        Launch(
            _tt_linear_fwd_kernel,
            grid,
            {
                "x_ptr": rows,
                "y_ptr": y,
                "waist_ptr": waist,
                "cores_ptr": cores.contiguous(),
                "bias_ptr": contiguous(bias),
                "tables_ptr": waist.new_empty(prod(grid) * plan.table_size),
                "N": N,
                "stride_xn": rows.stride(0),
            },
            {"L": L, "R": R, "TABLE_SIZE": plan.table_size, **block_constants(blocks, x.dtype, x.dtype)},
            blocks.warps,
            blocks.stages,
        )
    )
    return y, waist


def tt_linear_bwd(
    dy: Tensor,
    x: Tensor,
    waist: Tensor,
    cores: Tensor,
    spec: Sequence[int],
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dcores, dbias: those that `needs` names, an empty tensor for the others."""
    plan = linear_plan(TTShape.from_spec(tuple(spec)), x.dtype.itemsize, architecture(x.device))
    L, R = plan.sides
    rows, rows_of_dy, blocks = rows_of(x, L.size), rows_of(dy, R.size), plan.backward
    N = len(rows)
    grads = dx, dcores, dbias = grads_like((x, cores, bias), needs, N)
    if N == 0:
        return grads
    programs = plan.programs(N, blocks)
    launch.execute(
        Launch(
            _tt_linear_bwd_kernel,
            (programs,),
            {
                "dy_ptr": rows_of_dy,
                "x_ptr": rows,
                "waist_ptr": waist,
                "cores_ptr": cores.contiguous(),
                **needed({"dx_ptr": dx, "dcores_ptr": dcores, "dbias_ptr": dbias}, needs),
                "tables_ptr": waist.new_empty(programs * plan.table_size),
                "grads_ptr": waist.new_zeros(plan.grad_size),
                "scratch_ptr": waist.new_empty(plan.scratch_size),
                "N": N,
                "stride_dyn": rows_of_dy.stride(0),
                "stride_xn": rows.stride(0),
            },
            {
                "L": L,
                "R": R,
                "TABLE_SIZE": plan.table_size,
                "ARRIVED": plan.arrived,
                **block_constants(blocks, x.dtype, x.dtype),
            },
            blocks.warps,
            blocks.stages,
        )
    )
    return grads
