"""y = x · L · R + b through the waist s = x · L: one launch forward, one backward.

dR = sᵀ · dy      db = sum(dy)      ds = dy · Rᵀ      dL = xᵀ · ds      dx = ds · Lᵀ

Forward reads x and writes y and the waist [N, K]. Backward reads dy, then x, writes dx, and adds dL [I, K] and dR with
db [K + 1, O] to a zeroed buffer; the program that arrives last contracts them to the gradients of the cores. With few
rows, PARTS programs share the features of dR, dx and dL, and each makes ds for itself.
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
from loretta_kernels._triton.core_grads import copy, is_last, store_core_grads, sum_blocks, sum_programs
from loretta_kernels._triton.launch import Launch
from loretta_kernels._triton.operands import architecture, block_constants, contiguous, grads_like, needed, rows_of
from loretta_kernels._triton.plan import MAX_PROGRAMS, MAX_WORKSPACES, linear_plan
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


@triton.jit
def _store_grads(
    cores_ptr,
    dcores_ptr,
    dbias_ptr,
    grads_ptr,
    scratch_ptr,
    L: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the parameters from the sums over rows; by one program."""
    if dcores_ptr is not None:
        store_core_grads(dcores_ptr, grads_ptr, scratch_ptr, cores_ptr, 1.0, L, PRECISION)
        store_core_grads(dcores_ptr, grads_ptr, scratch_ptr, cores_ptr, 1.0, R, PRECISION)
    if dbias_ptr is not None:
        copy(dbias_ptr, grads_ptr + R.grad + R.K * R.size, 1.0, R.size)


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
    GRAD_SIZE: tl.constexpr,
    ARRIVED: tl.constexpr,
    # blocks and flags
    ATOMIC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dx block by block, the sums over rows, and at the end the gradients of the parameters."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    part = 0 if PARTS == 1 else tl.program_id(1)
    tables_ptr += (program * PARTS + part).to(tl.int64) * TABLE_SIZE
    if not ATOMIC:
        grads_ptr += program.to(tl.int64) * GRAD_SIZE
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
                mine = True if PARTS == 1 else c0 // BLOCK_C % PARTS == part
                if mine:
                    dtile = dot(tl.trans(dy), s_ones, tl.full([BLOCK_C, R.KP], 0, tl.float32), PRECISION)
                    add_grad(grads_ptr, c, dtile, R, ATOMIC)

        ds = cast(ds, DTYPE)
        if dx_ptr is not None or dcores_ptr is not None:
            for c0 in range(part * BLOCK_C, L.size, PARTS * BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                if dcores_ptr is not None:
                    x = cast(load_rows(x_ptr, rows, stride_xn, c, N, L.size), DTYPE)
                    dtile = dot(tl.trans(x), ds, tl.full([BLOCK_C, L.KP], 0, tl.float32), PRECISION)
                    add_grad(grads_ptr, c, dtile, L, ATOMIC)
                if dx_ptr is not None:
                    tile = cast(load_tile(tables_ptr, cores_ptr, kept, c0, L, BLOCK_C), DTYPE)
                    dx = dot(ds, tl.trans(tile), tl.full([BLOCK_N, BLOCK_C], 0, tl.float32), PRECISION)
                    store_rows(dx_ptr, rows, L.size, c, N, L.size, dx)

    if ATOMIC:
        if is_last(grads_ptr + ARRIVED, programs * PARTS):
            _store_grads(cores_ptr, dcores_ptr, dbias_ptr, grads_ptr, scratch_ptr, L, R, PRECISION)


@triton.jit
def _tt_linear_sum_kernel(
    # pointers
    cores_ptr,
    dcores_ptr,
    dbias_ptr,
    grads_ptr,
    sums_ptr,
    scratch_ptr,
    # sizes
    programs,
    # shape
    L: tl.constexpr,
    R: tl.constexpr,
    GRAD_SIZE: tl.constexpr,
    ARRIVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the parameters from the sums of every program, added in the order of the programs."""
    sum_programs(sums_ptr, grads_ptr, programs, ARRIVED, GRAD_SIZE)
    if is_last(sums_ptr + ARRIVED, tl.num_programs(0)):
        _store_grads(cores_ptr, dcores_ptr, dbias_ptr, sums_ptr, scratch_ptr, L, R, PRECISION)


def tt_linear_fwd(x: Tensor, cores: Tensor, spec: Sequence[int], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the waist."""
    plan = linear_plan(TTShape.from_spec(tuple(spec)), x.dtype.itemsize, architecture(x.device))
    L, R = plan.sides
    rows = rows_of(x, L.size)
    N, blocks = len(rows), plan.forward_of(len(rows))
    y = x.new_empty(*x.shape[:-1], R.size)
    waist = x.new_empty(N, L.K, dtype=torch.float32)
    if N == 0:
        return y, waist
    grid = plan.programs(N, blocks), plan.parts(N, blocks, R)
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
            {"L": L, "R": R, "TABLE_SIZE": plan.table_size, **block_constants(plan, blocks, x.dtype, x.dtype)},
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
    rows, rows_of_dy = rows_of(x, L.size), rows_of(dy, R.size)
    N, blocks = len(rows), plan.backward_of(len(rows))
    grads = dx, dcores, dbias = grads_like((x, cores, bias), needs, N)
    if N == 0:
        return grads
    atomic = not torch.are_deterministic_algorithms_enabled()
    programs = plan.programs(N, blocks, MAX_PROGRAMS if atomic else MAX_WORKSPACES)
    parts = plan.parts(N, blocks, L, R)
    parameters = {
        "cores_ptr": cores.contiguous(),
        **needed({"dcores_ptr": dcores, "dbias_ptr": dbias}, needs[1:]),
        "grads_ptr": waist.new_zeros((1 if atomic else programs) * plan.grad_size),
        "scratch_ptr": waist.new_empty(plan.scratch_size),
    }
    constants = {"L": L, "R": R, "GRAD_SIZE": plan.grad_size, "ARRIVED": plan.arrived}
    products = block_constants(plan, blocks, x.dtype, x.dtype)
    launch.execute(
        Launch(
            _tt_linear_bwd_kernel,
            (programs, parts),
            {
                **parameters,
                "dy_ptr": rows_of_dy,
                "x_ptr": rows,
                "waist_ptr": waist,
                "dx_ptr": dx if needs[0] else None,
                "tables_ptr": waist.new_empty(programs * parts * plan.table_size),
                "N": N,
                "stride_dyn": rows_of_dy.stride(0),
                "stride_xn": rows.stride(0),
            },
            {**constants, **products, "TABLE_SIZE": plan.table_size, "ATOMIC": atomic, "PARTS": parts},
            blocks.warps,
            blocks.stages,
        )
    )
    if not atomic and any(needs[1:]):
        launch.execute(
            Launch(
                _tt_linear_sum_kernel,
                (sum_blocks(plan.arrived),),
                {**parameters, "sums_ptr": waist.new_zeros(plan.grad_size), "programs": programs},
                {**constants, "PRECISION": products["PRECISION"]},
                blocks.warps,
                1,
            )
        )
    return grads
