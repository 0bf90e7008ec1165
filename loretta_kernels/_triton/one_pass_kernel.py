"""The forward of `forward_kernel` with whole rows on the chip: x is read once, as the residual too.

A side's chain is cut into an outer and an inner factor, and a row is a matrix [outer, inner] of features (o, i):

    L[(o, i), k] = sum_a outer[o, a] · inner[a, i, k]        R[k, (o, i)] = sum_a outer[k, o, a] · inner[a, i]

so that BLOCK_N rows are one tile [outer · BLOCK_N, inner], whose products with the inner factors, the same for every
outer index, are two products for tensor cores:

    p[(o, n), (a, k)] = x · inner        s[n, k] = sum_(o, a) outer[o, a] · p
    w[(o, n), a] = sum_k z[n, k] · outer[k, o, a]        y = residual + scale · (w · inner + b_u)
"""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import INTERPRETED, act, cast, kept_by_dropout
from loretta_kernels._triton.row_tables import load_inner, load_outer, load_whole, store_products

SUMMED_BY_LANES = tl.constexpr(1024)  # terms of so few sums that the lanes of a warp may share each of them


@triton.jit
def beside_remainder(w, DTYPE: tl.constexpr):
    """w [M, A] as [M, 2 A] in 16 bits: beside each number what is lost when it is rounded."""
    high = cast(w, DTYPE)
    return tl.join(high, cast(w - high.to(tl.float32), DTYPE)).reshape(w.shape[0], 2 * w.shape[1])


@triton.jit
def waist(p, outer, BLOCK_N: tl.constexpr, S: tl.constexpr):
    """s [n, k] = sum_(o, a) outer[o, a] · p[(o, n), (a, k)]."""
    p = p.reshape(S.OP, BLOCK_N, S.AP, S.QP) * outer[:, None, :, None]
    return tl.sum(tl.sum(p, 2), 0)


@triton.jit
def rounded_product(a, b):
    """a · b, rounded: fused with a sum over the lanes of a warp it would be another sum in every lane."""
    if INTERPRETED:
        return a * b
    a, b = tl.broadcast(a, b)
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=r,r,r", [a, b], tl.float32, is_pure=True, pack=1)


@triton.jit
def times(a, table):
    """a [n, k] · table [k, m], in fp32, without tensor cores: k is small."""
    a, table = tl.trans(a)[:, :, None], table[:, None, :]
    if a.shape[0] * a.shape[1] * table.shape[2] <= SUMMED_BY_LANES:
        return tl.sum(rounded_product(a, table), 0)
    else:
        return tl.sum(a * table, 0)


@triton.jit
def spread(z, outer, BLOCK_N: tl.constexpr, S: tl.constexpr):
    """w [(o, n), a] = sum_k z[n, k] · outer[k, (o, a)]."""
    w = times(z, outer).reshape(BLOCK_N, S.OP, S.AP)
    return tl.permute(w, (1, 0, 2)).reshape(S.OP * BLOCK_N, S.AP)


@triton.jit
def tile_ok(o, c, row_ok, S: tl.constexpr):
    """Which elements of a tile there are."""
    ok = (row_ok & (o < S.outer))[:, None]
    if S.inner % c.shape[0] != 0:
        ok = ok & (c < S.inner)[None, :]
    return ok


@triton.jit
def kept_of_block(seed_ptr, first, n, c0, DROPPED: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements (first + n, c0 .. c0 + BLOCK_C) of x dropout keeps: rows of a block have one high word."""
    low, high = (first.to(tl.uint32) + n.to(tl.uint32))[:, None], (first >> 32).to(tl.uint32)
    return kept_by_dropout(tl.load(seed_ptr), low, high, c0, DROPPED, BLOCK_C)


@triton.jit
def load_bias(bias_ptr, o, c, scale, S: tl.constexpr):
    """scale · bias of the features (o, c)."""
    ok = tile_ok(o, c, o >= 0, S)
    return tl.load(bias_ptr + (o * S.inner)[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32) * scale


@triton.jit
def bias_tile(bias_ptr, t, c, scale, S: tl.constexpr, DTYPE: tl.constexpr):
    """scale · bias in 16 bits: in row t = 2 o it is rounded, in the next one is what is lost by that."""
    bias = load_bias(bias_ptr, t // 2, c, scale, S)
    rounded = cast(bias, DTYPE)
    return tl.where((t % 2 == 0)[:, None], rounded, cast(bias - rounded.to(tl.float32), DTYPE))


@triton.jit(do_not_specialize=["N"])
def _one_pass_forward_kernel(
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
    LEVELS: tl.constexpr,
    # blocks and flags
    ACTIVATION: tl.constexpr,
    DROPOUT_P: tl.constexpr,
    DROPPED: tl.constexpr,
    KEEPS_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Rows of y, and of the waist, block by block."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tables_ptr += program.to(tl.int64) * TABLE_SIZE
    store_products(tables_ptr, down_ptr, up_ptr, LD, RD, LU, RU, LEVELS)
    if learnt_scale_ptr is not None:
        scale *= tl.load(learnt_scale_ptr).to(tl.float32)

    IN_BLOCKS: tl.constexpr = (LD.inner + BLOCK_I - 1) // BLOCK_I
    OUT_BLOCKS: tl.constexpr = (RU.inner + BLOCK_O - 1) // BLOCK_O
    IN_M: tl.constexpr = LD.OP * BLOCK_N
    OUT_M: tl.constexpr = RU.OP * BLOCK_N
    in_o = tl.arange(0, IN_M) // BLOCK_N
    out_o = tl.arange(0, OUT_M) // BLOCK_N
    in_n = tl.arange(0, IN_M) % BLOCK_N
    out_n = tl.arange(0, OUT_M) % BLOCK_N
    i = tl.arange(0, BLOCK_I)
    c = tl.arange(0, BLOCK_O)
    k = tl.arange(0, LD.QP)

    down_outer = load_outer(tables_ptr, down_ptr, LD)
    up_outer = load_outer(tables_ptr, up_ptr, RU)
    down_inner: tl.tuple = ()
    for j in tl.static_range(IN_BLOCKS):
        down_inner = down_inner + (cast(load_inner(tables_ptr, down_ptr, j * BLOCK_I + i, LD), DTYPE),)
    up_inner: tl.tuple = ()
    up_bias: tl.tuple = ()
    BIAS_BY_DOT: tl.constexpr = up_bias_ptr is not None and RU.OP <= 16
    if BIAS_BY_DOT:
        t = tl.arange(0, max(16, 2 * RU.OP))
        one_hot = cast(tl.where(out_o[:, None] == (t // 2)[None, :], 1.0, 0.0), DTYPE)
    for j in tl.static_range(OUT_BLOCKS):
        up_inner = up_inner + (cast(load_inner(tables_ptr, up_ptr, j * BLOCK_O + c, RU), DTYPE),)
        if BIAS_BY_DOT:
            up_bias = up_bias + (bias_tile(up_bias_ptr, t, j * BLOCK_O + c, scale, RU, DTYPE),)
    if RD is not None:
        down_table, up_table = load_whole(tables_ptr, down_ptr, RD), tl.trans(load_whole(tables_ptr, up_ptr, LU))
        b = tl.arange(0, RD.IP)
        if down_bias_ptr is not None:
            down_bias = tl.load(down_bias_ptr + b, mask=b < RD.size, other=0.0).to(tl.float32)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), programs, disable_licm=True):
        first = tl.cast(block, tl.int64) * BLOCK_N
        rows = first + in_n
        xs: tl.tuple = ()
        for j in tl.static_range(IN_BLOCKS):
            ptrs = x_ptr + (rows * stride_xn + in_o * LD.inner)[:, None] + (j * BLOCK_I + i)[None, :]
            xs = xs + (tl.load(ptrs, mask=tile_ok(in_o, j * BLOCK_I + i, rows < N, LD), other=0.0),)
        p = tl.full([IN_M, LD.AP * LD.QP], 0, tl.float32)
        for j in tl.static_range(IN_BLOCKS):
            x = xs[j]
            if DROPOUT_P > 0:
                is_kept = kept_of_block(seed_ptr, first, in_n, in_o * LD.inner + j * BLOCK_I, DROPPED, BLOCK_I)
                x = tl.where(is_kept, x, 0.0).to(DTYPE)
            p = tl.dot(x, down_inner[j], p)
        s = waist(p, down_outer, BLOCK_N, LD)
        if DROPOUT_P > 0:  # what the elements of x that are kept are multiplied by
            s *= 1 / (1 - DROPOUT_P)
        n = first + tl.arange(0, BLOCK_N)
        tl.store(waist_ptr + n[:, None] * LD.K + k[None, :], s, mask=(n < N)[:, None] & (k < LD.K)[None, :])

        z = s
        if RD is not None:
            h = times(s, down_table)
            if down_bias_ptr is not None:
                h += down_bias[None, :]
            z = times(act(h, ACTIVATION), up_table)
        w = beside_remainder(spread(z * scale, up_outer, BLOCK_N, RU), DTYPE)
        rows = first + out_n
        for j in tl.static_range(OUT_BLOCKS):
            ok = tile_ok(out_o, j * BLOCK_O + c, rows < N, RU)
            y = tl.full([OUT_M, BLOCK_O], 0, tl.float32)
            if BIAS_BY_DOT:
                y = tl.dot(one_hot, up_bias[j], y)
            y = tl.dot(w, up_inner[j], y)
            if up_bias_ptr is not None and not BIAS_BY_DOT:
                bias = load_bias(up_bias_ptr, tl.arange(0, RU.OP), j * BLOCK_O + c, scale, RU)
                y = (y.reshape(RU.OP, BLOCK_N, BLOCK_O) + bias[:, None, :]).reshape(OUT_M, BLOCK_O)
            offs = (out_o * RU.inner)[:, None] + (j * BLOCK_O + c)[None, :]
            if KEEPS_X:
                y += xs[j].to(tl.float32)
            elif residual_ptr is not None:
                y += tl.load(residual_ptr + (rows * stride_rn)[:, None] + offs, mask=ok, other=0.0).to(tl.float32)
            tl.store(y_ptr + (rows * RU.size)[:, None] + offs, cast(y, DTYPE), mask=ok)
