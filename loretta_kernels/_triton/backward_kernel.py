"""The gradients of y = residual + scale · (act(drop(x) · L_d · R_d + b_d) · L_u · R_u + b_u) in one launch.

dz = scale · dy · R_uᵀ      dR_u = scale · zᵀ · dy      db_u = scale · sum(dy)
da = dz · L_uᵀ              dL_u = aᵀ · dz
dh = da · act'(h)           dR_d = sᵀ · dh              db_d = sum(dh)
ds = dh · R_dᵀ              dL_d = drop(x)ᵀ · ds
dx = [residual is x] · dy + drop'(ds · L_dᵀ)            dscale = <z, dy · R_uᵀ> + <sum(dy), b_u>

Of stacked adapters every program takes rows of one of them; each adapter has sums of its own, and the last program of
its own.

Reads dy, then x and dy, writes dx, and adds the gradients of the sides, [I, K] and [K + 1, O], to a zeroed buffer; the
program that arrives last contracts them to those of the cores. With few rows, PARTS programs share the features of
dR_u, dx and dL_d; each makes ds for itself, and the first adds what has the bottleneck's size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import act, cast, dact, dot, dropout_factor
from loretta_kernels._triton.core_grads import copy, inner_product, is_last, store_core_grads, sum_programs
from loretta_kernels._triton.forward_kernel import hidden, up_waist
from loretta_kernels._triton.rows import (
    GROUP,
    block_rows,
    copy_rows,
    group_of,
    item_of,
    item_rows,
    load_rows,
    ones_beside,
    store_rows,
)
from loretta_kernels._triton.tiles import add_grad, keep_heavy, load_tile, store_tables


@triton.jit
def _store_grads(
    down_ptr,
    up_ptr,
    up_bias_ptr,
    ddown_ptr,
    ddown_bias_ptr,
    dup_ptr,
    dup_bias_ptr,
    dscale_ptr,
    grads_ptr,
    scratch_ptr,
    scale,
    total,
    LD: tl.constexpr,
    RD: tl.constexpr,
    LU: tl.constexpr,
    RU: tl.constexpr,
    DSCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the parameters from the sums over rows (dR_u and db_u lack the scale); by one program."""
    if ddown_ptr is not None:
        store_core_grads(ddown_ptr, grads_ptr, scratch_ptr, down_ptr, 1.0, LD, PRECISION)
        if RD is not None:
            store_core_grads(ddown_ptr, grads_ptr, scratch_ptr, down_ptr, 1.0, RD, PRECISION)
    if ddown_bias_ptr is not None:
        copy(ddown_bias_ptr, grads_ptr + RD.grad + RD.K * RD.size, 1.0, RD.size)
    if dup_ptr is not None:
        if LU is not None:
            store_core_grads(dup_ptr, grads_ptr, scratch_ptr, up_ptr, 1.0, LU, PRECISION)
        store_core_grads(dup_ptr, grads_ptr, scratch_ptr, up_ptr, total, RU, PRECISION)
    if dup_bias_ptr is not None:
        copy(dup_bias_ptr, grads_ptr + RU.grad + RU.K * RU.size, total, RU.size)
    if dscale_ptr is not None:
        dscale = tl.load(grads_ptr + DSCALE)
        if up_bias_ptr is not None:
            dscale += inner_product(grads_ptr + RU.grad + RU.K * RU.size, up_bias_ptr, RU.size)
        tl.store(dscale_ptr, cast(scale * dscale, dscale_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    # pointers
    dy_ptr,
    x_ptr,
    waist_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    learnt_scale_ptr,
    seed_ptr,
    dx_ptr,
    ddown_ptr,
    ddown_bias_ptr,
    dup_ptr,
    dup_bias_ptr,
    dscale_ptr,
    tables_ptr,
    grads_ptr,
    scratch_ptr,
    order_ptr,
    items_ptr,
    # sizes and strides
    N,
    stride_dyn,
    stride_xn,
    scale,
    # shape
    LD: tl.constexpr,
    RD: tl.constexpr,
    LU: tl.constexpr,
    RU: tl.constexpr,
    TABLE_SIZE: tl.constexpr,
    GRAD_SIZE: tl.constexpr,
    SCRATCH_SIZE: tl.constexpr,
    DSCALE: tl.constexpr,
    ARRIVED: tl.constexpr,
    # blocks and flags
    ACTIVATION: tl.constexpr,
    DROPOUT_P: tl.constexpr,
    DROPPED: tl.constexpr,
    RESIDUAL_IS_X: tl.constexpr,
    ATOMIC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dx block by block, the sums over rows, and at the end the gradients of the parameters."""
    D: tl.constexpr = RU if RD is None else RD  # whose end is that of the first train
    program, programs = tl.program_id(0), tl.num_programs(0)
    part = 0 if PARTS == 1 else tl.program_id(1)
    tables_ptr += (program * PARTS + part).to(tl.int64) * TABLE_SIZE
    if not ATOMIC:
        grads_ptr += program.to(tl.int64) * GRAD_SIZE
    if items_ptr is not None:
        adapter, start, stop = item_of(items_ptr, program)
        if adapter < 0:
            if dx_ptr is not None:
                if RESIDUAL_IS_X:
                    copy_rows(
                        dx_ptr, dy_ptr, order_ptr, start, stop, part, PARTS, N, stride_dyn, LD.size, BLOCK_N, BLOCK_C
                    )
                else:
                    copy_rows(dx_ptr, None, order_ptr, start, stop, part, PARTS, N, 0, LD.size, BLOCK_N, BLOCK_C)
            return
        if ATOMIC:
            grads_ptr += group_of(items_ptr, program)[0] * GRAD_SIZE
        down_ptr += adapter * D.end
        up_ptr += adapter * RU.end
        if down_bias_ptr is not None:
            down_bias_ptr += adapter * D.size
        if up_bias_ptr is not None:
            up_bias_ptr += adapter * RU.size
        if learnt_scale_ptr is not None:
            learnt_scale_ptr += adapter
    store_tables(tables_ptr, down_ptr, LD)
    if RD is not None:
        store_tables(tables_ptr, down_ptr, RD)
        store_tables(tables_ptr, up_ptr, LU)
    store_tables(tables_ptr, up_ptr, RU)
    tl.debug_barrier()
    kept = keep_heavy(tables_ptr, down_ptr, LD, BLOCK_C)
    if learnt_scale_ptr is not None:
        learnt_scale = tl.load(learnt_scale_ptr).to(tl.float32)
        total = scale * learnt_scale
    else:
        total = scale

    SUMS_RD: tl.constexpr = ddown_ptr is not None or ddown_bias_ptr is not None
    SUMS_RU: tl.constexpr = dup_ptr is not None or dup_bias_ptr is not None or dscale_ptr is not None
    # dscale is one sum: what R_u loses to 16 bits would not average out of it.
    EXACT_DZ: tl.constexpr = dscale_ptr is not None and DTYPE != tl.float32

    dscale = tl.full([], 0, tl.float32)
    if items_ptr is None:
        first, last, step = program, tl.cdiv(N, BLOCK_N), programs
    else:
        first, last, step = start, stop, BLOCK_N
    for block in tl.range(first, last, step, disable_licm=True):
        if items_ptr is None:
            rows = block_rows(block, BLOCK_N)
        else:
            rows = item_rows(order_ptr, block, stop, N, BLOCK_N)
        s = load_rows(waist_ptr, rows, LD.K, tl.arange(0, LD.KP), N, LD.K)
        z = up_waist(s, tables_ptr, down_ptr, down_bias_ptr, up_ptr, RD, LU, ACTIVATION, BLOCK_B, PRECISION)

        dz = tl.full([BLOCK_N, RU.KP], 0, tl.float32)
        z_ones = cast(ones_beside(z, RU.K), DTYPE)
        for c0 in range(0, RU.size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            dy = cast(load_rows(dy_ptr, rows, stride_dyn, c, N, RU.size), DTYPE)
            tile = load_tile(tables_ptr, up_ptr, (), c0, RU, BLOCK_C)
            high = cast(tile, DTYPE)
            dz = dot(dy, high, dz, PRECISION)
            if EXACT_DZ:
                dz = dot(dy, cast(tile - high.to(tl.float32), DTYPE), dz, PRECISION)
            if SUMS_RU:
                mine = True if PARTS == 1 else c0 // BLOCK_C % PARTS == part
                if mine:
                    dtile = dot(tl.trans(dy), z_ones, tl.full([BLOCK_C, RU.KP], 0, tl.float32), PRECISION)
                    add_grad(grads_ptr, c, dtile, RU, ATOMIC)
        if dscale_ptr is not None:
            dscale += tl.sum(z * dz)
        dz *= total

        if RD is None:
            ds = dz
        else:
            ds = tl.full([BLOCK_N, LD.KP], 0, tl.float32)
            for b0 in tl.range(0, RD.size, BLOCK_B, num_stages=1):  # as in `up_waist`
                b = b0 + tl.arange(0, BLOCK_B)
                h, down_tile = hidden(s, tables_ptr, down_ptr, down_bias_ptr, b0, RD, BLOCK_B, PRECISION)
                up_tile = load_tile(tables_ptr, up_ptr, (), b0, LU, BLOCK_B)
                da = dot(dz, tl.trans(up_tile), tl.full([BLOCK_N, BLOCK_B], 0, tl.float32), PRECISION)
                dh = da * dact(h, ACTIVATION)
                ds = dot(dh, down_tile, ds, PRECISION)
                if part == 0:
                    if dup_ptr is not None:
                        a = act(h, ACTIVATION)
                        dtile = dot(tl.trans(a), dz, tl.full([BLOCK_B, LU.KP], 0, tl.float32), PRECISION)
                        add_grad(grads_ptr, b, dtile, LU, ATOMIC)
                    if SUMS_RD:
                        dtile = tl.full([BLOCK_B, RD.KP], 0, tl.float32)
                        if PRECISION == "tf32":  # that would round before the sum for the bias
                            is_bias = (tl.arange(0, RD.KP) == RD.K)[None, :]
                            dtile = tl.where(is_bias, tl.sum(dh, 0)[:, None], dot(tl.trans(dh), s, dtile, PRECISION))
                        else:
                            dtile = dot(tl.trans(dh), ones_beside(s, RD.K), dtile, PRECISION)
                        add_grad(grads_ptr, b, dtile, RD, ATOMIC)

        ds = cast(ds, DTYPE)
        if dx_ptr is not None or ddown_ptr is not None:
            for c0 in range(part * BLOCK_C, LD.size, PARTS * BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                if RESIDUAL_IS_X and dx_ptr is not None:
                    base = load_rows(dy_ptr, rows, stride_dyn, c, N, RU.size)
                if DROPOUT_P > 0:
                    factor = dropout_factor(tl.load(seed_ptr), rows, c0, DROPOUT_P, DROPPED, BLOCK_C)
                if ddown_ptr is not None:
                    x = load_rows(x_ptr, rows, stride_xn, c, N, LD.size)
                    if DROPOUT_P > 0:
                        x = x.to(tl.float32) * factor
                    x = cast(x, DTYPE)
                    dtile = dot(tl.trans(x), ds, tl.full([BLOCK_C, LD.KP], 0, tl.float32), PRECISION)
                    add_grad(grads_ptr, c, dtile, LD, ATOMIC)
                if dx_ptr is not None:
                    tile = cast(load_tile(tables_ptr, down_ptr, kept, c0, LD, BLOCK_C), DTYPE)
                    dx = dot(ds, tl.trans(tile), tl.full([BLOCK_N, BLOCK_C], 0, tl.float32), PRECISION)
                    if DROPOUT_P > 0:
                        dx *= factor
                    if RESIDUAL_IS_X:
                        dx += base.to(tl.float32)
                    store_rows(dx_ptr, rows, LD.size, c, N, LD.size, dx)

    if dscale_ptr is not None:
        if part == 0:
            if ATOMIC:
                tl.atomic_add(grads_ptr + DSCALE, dscale, sem="relaxed")
            else:
                tl.store(grads_ptr + DSCALE, dscale)
    if ATOMIC:
        if items_ptr is not None:  # read again: what is needed only here would cost the loop registers
            group, programs = group_of(items_ptr, program)
            scratch_ptr += group * SCRATCH_SIZE
            own = item_of(items_ptr, program)[0]
            if ddown_ptr is not None:
                ddown_ptr += own * D.end
            if dup_ptr is not None:
                dup_ptr += own * RU.end
            if ddown_bias_ptr is not None:
                ddown_bias_ptr += own * D.size
            if dup_bias_ptr is not None:
                dup_bias_ptr += own * RU.size
            if dscale_ptr is not None:
                dscale_ptr += own
        if is_last(grads_ptr + ARRIVED, programs * PARTS):
            _store_grads(
                down_ptr, up_ptr, up_bias_ptr, ddown_ptr, ddown_bias_ptr, dup_ptr, dup_bias_ptr, dscale_ptr, grads_ptr,
                scratch_ptr, scale, total, LD, RD, LU, RU, DSCALE, PRECISION,
            )  # fmt: skip


@triton.jit
def _sum_kernel(
    # pointers
    down_ptr,
    up_ptr,
    up_bias_ptr,
    learnt_scale_ptr,
    ddown_ptr,
    ddown_bias_ptr,
    dup_ptr,
    dup_bias_ptr,
    dscale_ptr,
    grads_ptr,
    sums_ptr,
    scratch_ptr,
    groups_ptr,
    # sizes
    programs,
    scale,
    # shape
    LD: tl.constexpr,
    RD: tl.constexpr,
    LU: tl.constexpr,
    RU: tl.constexpr,
    GRAD_SIZE: tl.constexpr,
    SCRATCH_SIZE: tl.constexpr,
    DSCALE: tl.constexpr,
    ARRIVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the parameters from the sums of every program, added in the order of the programs."""
    if groups_ptr is not None:
        group = tl.program_id(1).to(tl.int64)
        adapter = tl.cast(tl.load(groups_ptr + group * GROUP), tl.int64)
        first, programs = tl.load(groups_ptr + group * GROUP + 1), tl.load(groups_ptr + group * GROUP + 2)
        grads_ptr += first.to(tl.int64) * GRAD_SIZE
        sums_ptr += group * GRAD_SIZE
        scratch_ptr += group * SCRATCH_SIZE
        D: tl.constexpr = RU if RD is None else RD  # whose end is that of the first train
        down_ptr += adapter * D.end
        up_ptr += adapter * RU.end
        if up_bias_ptr is not None:
            up_bias_ptr += adapter * RU.size
        if learnt_scale_ptr is not None:
            learnt_scale_ptr += adapter
        if ddown_ptr is not None:
            ddown_ptr += adapter * D.end
        if dup_ptr is not None:
            dup_ptr += adapter * RU.end
        if ddown_bias_ptr is not None:
            ddown_bias_ptr += adapter * D.size
        if dup_bias_ptr is not None:
            dup_bias_ptr += adapter * RU.size
        if dscale_ptr is not None:
            dscale_ptr += adapter
    sum_programs(sums_ptr, grads_ptr, programs, ARRIVED, GRAD_SIZE)
    if is_last(sums_ptr + ARRIVED, tl.num_programs(0)):
        total = scale
        if learnt_scale_ptr is not None:
            total *= tl.load(learnt_scale_ptr).to(tl.float32)
        _store_grads(
            down_ptr, up_ptr, up_bias_ptr, ddown_ptr, ddown_bias_ptr, dup_ptr, dup_bias_ptr, dscale_ptr, sums_ptr,
            scratch_ptr, scale, total, LD, RD, LU, RU, DSCALE, PRECISION,
        )  # fmt: skip
