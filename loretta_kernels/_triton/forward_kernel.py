"""y = residual + scale · (act(drop(x) · L_d · R_d + b_d) · L_u · R_u + b_u) in one launch.

s = drop(x) · L_d     h = s · R_d + b_d     a = act(h)     z = a · L_u     y = residual + scale · (z · R_u + b_u)

Of one train alone (R_d and L_u None) z is s, and R_u, b_u are its own.

Of stacked adapters every program takes rows of one of them (`order_ptr`, `items_ptr`); those of none are copied.

Reads x, twice where it is the residual (the second time from L2), and writes y and the waist s [N, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import act, cast, dot, dropout_factor
from loretta_kernels._triton.rows import block_rows, copy_rows, item_of, item_rows, load_rows, store_rows
from loretta_kernels._triton.tiles import keep_heavy, load_tile, store_tables


@triton.jit
def hidden(
    s, tables_ptr, down_ptr, down_bias_ptr, b0, RD: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr
):
    """h = s · R_d + b_d for the bottleneck features from b0, and their tile of R_d."""
    b = b0 + tl.arange(0, BLOCK_B)
    tile = load_tile(tables_ptr, down_ptr, (), b0, RD, BLOCK_B)
    h = dot(s, tl.trans(tile), tl.full([s.shape[0], BLOCK_B], 0, tl.float32), PRECISION)
    if down_bias_ptr is not None:
        h += tl.load(down_bias_ptr + b, mask=b < RD.size, other=0.0).to(tl.float32)[None, :]
    return h, tile


@triton.jit
def up_waist(
    s,
    tables_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    RD: tl.constexpr,
    LU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = act(s · R_d + b_d) · L_u; s of one train alone."""
    if RD is None:
        z = s
    else:
        z = tl.full([s.shape[0], LU.KP], 0, tl.float32)
        # Not pipelined: Triton 3.7.1 puts no proxy fence between cp.async and a wgmma that reads what it copied.
        for b0 in tl.range(0, RD.size, BLOCK_B, num_stages=1):
            h, _ = hidden(s, tables_ptr, down_ptr, down_bias_ptr, b0, RD, BLOCK_B, PRECISION)
            z = dot(act(h, ACTIVATION), load_tile(tables_ptr, up_ptr, (), b0, LU, BLOCK_B), z, PRECISION)
    return z


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    # pointers
    x_ptr,
    residual_ptr,
    y_ptr,
    waist_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    learnt_scale_ptr,
    seed_ptr,
    tables_ptr,
    order_ptr,
    items_ptr,
    # sizes and strides
    N,
    stride_xn,
    stride_rn,
    scale,
    # shape
    LD: tl.constexpr,
    RD: tl.constexpr,
    LU: tl.constexpr,
    RU: tl.constexpr,
    TABLE_SIZE: tl.constexpr,
    # blocks and flags
    ACTIVATION: tl.constexpr,
    DROPOUT_P: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of y, and of the waist, block by block."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    part, parts = tl.program_id(1), tl.num_programs(1)
    tables_ptr += (program * parts + part).to(tl.int64) * TABLE_SIZE
    if items_ptr is not None:
        adapter, start, stop = item_of(items_ptr, program)
        if adapter < 0:
            copy_rows(y_ptr, residual_ptr, order_ptr, start, stop, part, parts, N, stride_rn, RU.size, BLOCK_N, BLOCK_C)
            if part == 0:
                copy_rows(waist_ptr, None, order_ptr, start, stop, 0, 1, N, 0, LD.K, BLOCK_N, LD.KP)
            return
        D: tl.constexpr = RU if RD is None else RD  # whose end is that of the first train
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
        scale *= tl.load(learnt_scale_ptr).to(tl.float32)

    if items_ptr is None:
        first, last, step = program, tl.cdiv(N, BLOCK_N), programs
    else:
        first, last, step = start, stop, BLOCK_N
    for block in tl.range(first, last, step, disable_licm=True):
        if items_ptr is None:
            rows = block_rows(block, BLOCK_N)
        else:
            rows = item_rows(order_ptr, block, stop, N, BLOCK_N)
        s = tl.full([BLOCK_N, LD.KP], 0, tl.float32)
        for c0 in range(0, LD.size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            x = load_rows(x_ptr, rows, stride_xn, c, N, LD.size)
            if DROPOUT_P > 0:
                factor = dropout_factor(tl.load(seed_ptr), rows, c0, DROPOUT_P, DROPPED, BLOCK_C)
                x = x.to(tl.float32) * factor
            tile = load_tile(tables_ptr, down_ptr, kept, c0, LD, BLOCK_C)
            s = dot(cast(x, DTYPE), cast(tile, DTYPE), s, PRECISION)
        if part == 0:
            store_rows(waist_ptr, rows, LD.K, tl.arange(0, LD.KP), N, LD.K, s)

        z = up_waist(s, tables_ptr, down_ptr, down_bias_ptr, up_ptr, RD, LU, ACTIVATION, BLOCK_B, PRECISION)
        z = cast(z * scale, DTYPE)
        for c0 in range(part * BLOCK_C, RU.size, parts * BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            if residual_ptr is not None:
                base = load_rows(residual_ptr, rows, stride_rn, c, N, RU.size)
            tile = load_tile(tables_ptr, up_ptr, (), c0, RU, BLOCK_C)
            y = dot(z, tl.trans(cast(tile, DTYPE)), tl.full([BLOCK_N, BLOCK_C], 0, tl.float32), PRECISION)
            if up_bias_ptr is not None:
                y += scale * tl.load(up_bias_ptr + c, mask=c < RU.size, other=0.0).to(tl.float32)[None, :]
            if residual_ptr is not None:
                y += base.to(tl.float32)
            store_rows(y_ptr, rows, RU.size, c, N, RU.size, y)
