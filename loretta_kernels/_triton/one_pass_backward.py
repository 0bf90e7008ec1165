"""The backward of `backward_kernel` with whole rows on the chip: x and dy are read once, dx is written once.

A row is a matrix [outer, inner] of features (o, i), as in `one_pass_kernel`. Pairs c = (a, k) of the index of a bond
and that of a waist are packed side by side, so that outer factors multiply elementwise:

    t[(n, o), c] = dy · inner[i, a]      dz[n, k] = scale · sum_(o, a) outer[o, c] · t      d outer[o, c] = z[n, k] · t
    w[(n, o), a] = sum_k z[n, k] · outer[k, o, a]         d inner[i, a] = dyᵀ · w           db_u[o, i] = dy
    p[(n, o), c] = x · inner[i, c]       g[(n, o), c] = outer[o, a] · ds[n, k]              d outer[o, c] = ds[n, k] · p
    d inner[i, c] = xᵀ · g               dx = [residual is x] · dy + g · innerᵀ

all of them summed over rows: d inner and db_u in registers, over all rows of a program; the others, some 2,000
numbers, in memory from block to block, since registers are what this kernel is short of. What is summed are gradients
of factors; the program that arrives last contracts them to those of the cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import act, cast, dact, dot
from loretta_kernels._triton.core_grads import copy, is_last, store_core_grads
from loretta_kernels._triton.one_pass_kernel import (
    beside_remainder,
    kept_of_block,
    rounded_product,
    spread,
    tile_ok,
    times,
)
from loretta_kernels._triton.row_tables import (
    load_outer,
    load_packed_inner,
    load_packed_outer,
    load_whole,
    store_products,
)


@triton.jit
def _matrix(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the elements of a matrix without gaps are."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _keep(ptr, table):
    """Store a table without gaps: where to load it from is then the same for all tables, which saves registers."""
    tl.store(ptr + _matrix(table.shape[0], table.shape[1]), table)


@triton.jit
def _kept(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A table that `_keep` stored."""
    return tl.load(ptr + _matrix(ROWS, COLUMNS))


@triton.jit
def _places(ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr):
    """The rows and columns of a matrix's elements: [ROWS, 1] and [1, COLUMNS], or all of them in one dimension.

    Which of the two decides what the compiler keeps in registers from the tables to here, and so whether it spills.
    """
    if FLAT:
        e = tl.arange(0, ROWS * COLUMNS)
        places = e // COLUMNS, e % COLUMNS
    else:
        places = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return places


@triton.jit
def _add(ptr, sums):
    """Add a matrix to sums without gaps."""
    tl.atomic_add(ptr + _matrix(sums.shape[0], sums.shape[1]), sums, sem="relaxed")


@triton.jit
def _plus_products(sums, rows, right, PRECISION: tl.constexpr):
    """sums + rowsᵀ · right, for each block of inner features."""
    new: tl.tuple = ()
    for j in tl.static_range(len(rows)):
        new = new + (dot(tl.trans(rows[j]), right, sums[j], PRECISION),)
    return new


@triton.jit
def _is_waist(S: tl.constexpr):
    """[k, c]: 1 where k is the waist's index of the pair c."""
    k, c = tl.arange(0, S.QP)[:, None], tl.arange(0, S.CP)[None, :]
    return tl.where((c % S.K == k) & (c < S.A * S.K), 1.0, 0.0)


@triton.jit
def _keep_tables(
    kept_ptr, tables_ptr, down_ptr, down_bias_ptr, up_ptr, LD: tl.constexpr, RD: tl.constexpr, LU: tl.constexpr,
    RU: tl.constexpr, AT: tl.constexpr,
):  # fmt: skip
    """All tables but those of the inner factors."""
    _keep(kept_ptr + AT.up_outer, load_outer(tables_ptr, up_ptr, RU))
    _keep(kept_ptr + AT.up_packed, load_packed_outer(tables_ptr, up_ptr, RU))
    _keep(kept_ptr + AT.up_waist, _is_waist(RU))
    _keep(kept_ptr + AT.down_packed, load_packed_outer(tables_ptr, down_ptr, LD))
    _keep(kept_ptr + AT.down_waist, _is_waist(LD))
    if RD is not None:
        _keep(kept_ptr + AT.down_whole, load_whole(tables_ptr, down_ptr, RD))
        _keep(kept_ptr + AT.up_whole, load_whole(tables_ptr, up_ptr, LU))
        if down_bias_ptr is not None:
            b = tl.arange(0, RD.IP)
            bias = tl.load(down_bias_ptr + b, mask=b < RD.size, other=0.0).to(tl.float32)
            tl.store(kept_ptr + AT.down_bias + b, bias)
    tl.debug_barrier()


@triton.jit
def _store_grads(
    down_ptr, up_ptr, ddown_ptr, ddown_bias_ptr, dup_ptr, dup_bias_ptr, grads_ptr, sums_ptr, scratch_ptr, total,
    LD: tl.constexpr, RD: tl.constexpr, LU: tl.constexpr, RU: tl.constexpr, AT: tl.constexpr, P: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters from the sums over rows (those of R_u and b_u lack the scale); by one program."""
    if ddown_ptr is not None:
        o, a = _places(LD.OP, LD.AP, FLAT)
        ok = (o < LD.outer) & (a < LD.A)
        sums = (o + a) * 0.0
        for k in range(LD.K):
            sums += tl.load(sums_ptr + AT.down_packed + o * LD.CP + a * LD.K + k, mask=ok, other=0.0)
        tl.store(grads_ptr + LD.outer_factor.grad + o * LD.A + a, sums, mask=ok)
        if RD is not None:
            k, b = _places(RD.QP, RD.IP, FLAT)
            sums = tl.load(sums_ptr + AT.down_whole + k * RD.IP + b)
            tl.store(grads_ptr + RD.grad + k * RD.size + b, sums, mask=(k < RD.K) & (b < RD.size))
    if dup_ptr is not None:
        o, c = _places(RU.OP, RU.CP, FLAT)
        sums = tl.load(sums_ptr + AT.up_packed + o * RU.CP + c)
        offs = (c % RU.K * RU.outer + o) * RU.A + c // RU.K
        tl.store(grads_ptr + RU.outer_factor.grad + offs, sums, mask=(o < RU.outer) & (c < RU.A * RU.K))
        if LU is not None:
            k, b = _places(LU.QP, LU.IP, FLAT)
            sums = tl.load(sums_ptr + AT.up_whole + k * LU.IP + b)
            tl.store(grads_ptr + LU.grad + b * LU.K + k, sums, mask=(k < LU.K) & (b < LU.size))
    tl.debug_barrier()
    if ddown_ptr is not None:
        store_core_grads(ddown_ptr, grads_ptr, scratch_ptr, down_ptr, 1.0, tl.constexpr(LD.outer_factor), P, BLOCK_C)
        store_core_grads(ddown_ptr, grads_ptr, scratch_ptr, down_ptr, 1.0, tl.constexpr(LD.inner_factor), P, BLOCK_C)
        if RD is not None:
            store_core_grads(ddown_ptr, grads_ptr, scratch_ptr, down_ptr, 1.0, RD, P, BLOCK_C)
    if ddown_bias_ptr is not None:
        copy(ddown_bias_ptr, sums_ptr + AT.down_bias, 1.0, RD.size)
    if dup_ptr is not None:
        if LU is not None:
            store_core_grads(dup_ptr, grads_ptr, scratch_ptr, up_ptr, 1.0, LU, P, BLOCK_C)
        store_core_grads(dup_ptr, grads_ptr, scratch_ptr, up_ptr, total, tl.constexpr(RU.outer_factor), P, BLOCK_C)
        store_core_grads(dup_ptr, grads_ptr, scratch_ptr, up_ptr, total, tl.constexpr(RU.inner_factor), P, BLOCK_C)
    if dup_bias_ptr is not None:
        copy(dup_bias_ptr, grads_ptr + RU.bias_grad, total, RU.size)


@triton.jit(do_not_specialize=["N"])
def _one_pass_backward_kernel(
    # pointers
    dy_ptr,
    x_ptr,
    waist_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    learnt_scale_ptr,
    seed_ptr,
    dx_ptr,
    ddown_ptr,
    ddown_bias_ptr,
    dup_ptr,
    dup_bias_ptr,
    tables_ptr,
    grads_ptr,
    scratch_ptr,
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
    AT: tl.constexpr,
    TABLE_SIZE: tl.constexpr,
    FLAT: tl.constexpr,
    LEVELS: tl.constexpr,
    # blocks and flags
    ACTIVATION: tl.constexpr,
    DROPOUT_P: tl.constexpr,
    DROPPED: tl.constexpr,
    RESIDUAL_IS_X: tl.constexpr,
    KEEPS_DY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dx block by block, the sums over rows, and at the end the gradients of the parameters."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tables_ptr += program.to(tl.int64) * TABLE_SIZE
    kept_ptr, sums_ptr = tables_ptr + AT.tables, grads_ptr + AT.sums
    store_products(tables_ptr, down_ptr, up_ptr, LD, RD, LU, RU, LEVELS)
    _keep_tables(kept_ptr, tables_ptr, down_ptr, down_bias_ptr, up_ptr, LD, RD, LU, RU, AT)
    total = scale
    if learnt_scale_ptr is not None:
        total *= tl.load(learnt_scale_ptr).to(tl.float32)

    IN_BLOCKS: tl.constexpr = (LD.inner + BLOCK_I - 1) // BLOCK_I
    OUT_BLOCKS: tl.constexpr = (RU.inner + BLOCK_O - 1) // BLOCK_O
    IN_M: tl.constexpr = LD.OP * BLOCK_N
    OUT_M: tl.constexpr = RU.OP * BLOCK_N
    in_o, in_n = tl.arange(0, IN_M) // BLOCK_N, tl.arange(0, IN_M) % BLOCK_N
    out_o, out_n = tl.arange(0, OUT_M) // BLOCK_N, tl.arange(0, OUT_M) % BLOCK_N
    i = tl.arange(0, BLOCK_I)
    c = tl.arange(0, BLOCK_O)
    k = tl.arange(0, LD.QP)
    OP: tl.constexpr = max(16, RU.OP)
    one_hot = cast(tl.where(out_o[:, None] == tl.arange(0, OP)[None, :], 1.0, 0.0), DTYPE)
    if KEEPS_DY:
        identity = cast(tl.where(i[:, None] == i[None, :], 1.0, 0.0), DTYPE)
    down_inner: tl.tuple = ()
    ddown_inner: tl.tuple = ()
    for j in tl.static_range(IN_BLOCKS):
        down_inner = down_inner + (cast(load_packed_inner(tables_ptr, down_ptr, j * BLOCK_I + i, LD), DTYPE),)
        ddown_inner = ddown_inner + (tl.full([BLOCK_I, LD.CP], 0, tl.float32),)
    up_inner: tl.tuple = ()
    dup_inner: tl.tuple = ()
    dup_bias: tl.tuple = ()
    for j in tl.static_range(OUT_BLOCKS):
        up_inner = up_inner + (cast(load_packed_inner(tables_ptr, up_ptr, j * BLOCK_O + c, RU), DTYPE),)
        dup_inner = dup_inner + (tl.full([BLOCK_O, 2 * RU.AP], 0, tl.float32),)
        dup_bias = dup_bias + (tl.full([BLOCK_O, OP], 0, tl.float32),)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), programs, disable_licm=True):
        first = tl.cast(block, tl.int64) * BLOCK_N
        rows = tl.minimum(N - first, BLOCK_N).to(tl.int32)
        n = tl.arange(0, BLOCK_N)
        ok = (n < rows)[:, None] & (k < LD.K)[None, :]
        s = tl.load(waist_ptr + first * LD.K + (n[:, None] * LD.K + k[None, :]), mask=ok, other=0.0)
        dys: tl.tuple = ()
        for j in tl.static_range(OUT_BLOCKS):
            offs = (out_n * stride_dyn + out_o * RU.inner)[:, None] + (j * BLOCK_O + c)[None, :]
            ok = tile_ok(out_o, j * BLOCK_O + c, out_n < rows, RU)
            dys = dys + (tl.load(dy_ptr + first * stride_dyn + offs, mask=ok, other=0.0),)
        xs: tl.tuple = ()
        if ddown_ptr is not None:
            for j in tl.static_range(IN_BLOCKS):
                offs = (in_n * stride_xn + in_o * LD.inner)[:, None] + (j * BLOCK_I + i)[None, :]
                ok = tile_ok(in_o, j * BLOCK_I + i, in_n < rows, LD)
                xs = xs + (tl.load(x_ptr + first * stride_xn + offs, mask=ok, other=0.0),)

        z = s
        if RD is not None:
            down_table = _kept(kept_ptr + AT.down_whole, RD.QP, RD.IP)
            up_table = _kept(kept_ptr + AT.up_whole, LU.QP, LU.IP)
            h = times(s, down_table)
            if down_bias_ptr is not None:
                h += tl.load(kept_ptr + AT.down_bias + tl.arange(0, RD.IP))[None, :]
            a = act(h, ACTIVATION)
            z = times(a, tl.trans(up_table))

        t = tl.full([OUT_M, RU.CP], 0, tl.float32)
        # Always true: where another product hangs on this one, Triton has two warps do the same part of it, unless
        # there is a branch between them.
        if N > 0:
            for j in tl.static_range(OUT_BLOCKS):
                t = dot(dys[j], up_inner[j], t, PRECISION)
        t = t.reshape(RU.OP, BLOCK_N, RU.CP)
        outer, is_waist = _kept(kept_ptr + AT.up_packed, RU.OP, RU.CP), _kept(kept_ptr + AT.up_waist, RU.QP, RU.CP)
        dz = total * times(tl.sum(rounded_product(t, outer[:, None, :]), 0), tl.trans(is_waist))
        if dup_ptr is not None:
            _add(sums_ptr + AT.up_packed, tl.sum(rounded_product(t, times(z, is_waist)[None, :, :]), 1))
            up_outer = _kept(kept_ptr + AT.up_outer, RU.QP, RU.OP * RU.AP)
            w = beside_remainder(spread(z, up_outer, BLOCK_N, RU), DTYPE)
            dup_inner = _plus_products(dup_inner, dys, w, PRECISION)
        if dup_bias_ptr is not None:
            dup_bias = _plus_products(dup_bias, dys, one_hot, PRECISION)

        ds = dz
        if RD is not None:
            dh = times(dz, up_table) * dact(h, ACTIVATION)
            ds = times(dh, tl.trans(down_table))
            if dup_ptr is not None:
                _add(sums_ptr + AT.up_whole, times(tl.trans(dz), a))
            if ddown_ptr is not None:
                _add(sums_ptr + AT.down_whole, times(tl.trans(s), dh))
            if ddown_bias_ptr is not None:
                tl.atomic_add(sums_ptr + AT.down_bias + tl.arange(0, RD.IP), tl.sum(dh, 0), sem="relaxed")

        if DROPOUT_P > 0:  # what the elements of x that are kept are multiplied by
            ds *= 1 / (1 - DROPOUT_P)
        ds = times(ds, _kept(kept_ptr + AT.down_waist, LD.QP, LD.CP))[None, :, :]
        outer = _kept(kept_ptr + AT.down_packed, LD.OP, LD.CP)
        g = cast((outer[:, None, :] * ds).reshape(IN_M, LD.CP), DTYPE)
        if ddown_ptr is not None:
            p = tl.full([IN_M, LD.CP], 0, tl.float32)
            added: tl.tuple = ()
            for j in tl.static_range(IN_BLOCKS):
                x = xs[j]
                if DROPOUT_P > 0:  # what is kept of x is at hand once; without dropout both at once would spill
                    is_kept = kept_of_block(seed_ptr, first, in_n, in_o * LD.inner + j * BLOCK_I, DROPPED, BLOCK_I)
                    x = tl.where(is_kept, x, 0.0).to(DTYPE)
                    added = added + (dot(tl.trans(x), g, ddown_inner[j], PRECISION),)
                p = dot(x, down_inner[j], p, PRECISION)
            _add(sums_ptr + AT.down_packed, tl.sum(rounded_product(p.reshape(LD.OP, BLOCK_N, LD.CP), ds), 1))
            ddown_inner = added if DROPOUT_P > 0 else _plus_products(ddown_inner, xs, g, PRECISION)
        if dx_ptr is not None:
            for j in tl.static_range(IN_BLOCKS):
                dx = tl.full([IN_M, BLOCK_I], 0, tl.float32)
                if N > 0:  # as above
                    dx = dot(g, tl.trans(down_inner[j]), dx, PRECISION)
                if DROPOUT_P > 0:
                    is_kept = kept_of_block(seed_ptr, first, in_n, in_o * LD.inner + j * BLOCK_I, DROPPED, BLOCK_I)
                    dx = tl.where(is_kept, dx, 0.0)
                if KEEPS_DY:  # from shared memory; in registers it would be for the whole of the loop
                    dx = dot(dys[j], identity, dx, PRECISION)
                ok = tile_ok(in_o, j * BLOCK_I + i, in_n < rows, LD)
                offs = (in_o * LD.inner)[:, None] + (j * BLOCK_I + i)[None, :]
                if RESIDUAL_IS_X and not KEEPS_DY:
                    ptrs = dy_ptr + first * stride_dyn + ((in_n * stride_dyn)[:, None] + offs)
                    dx += tl.load(ptrs, mask=ok, other=0.0).to(tl.float32)
                tl.store(dx_ptr + first * LD.size + ((in_n * LD.size)[:, None] + offs), cast(dx, DTYPE), mask=ok)

    if dup_ptr is not None:
        for j in tl.static_range(OUT_BLOCKS):
            a, f = tl.arange(0, 2 * RU.AP)[None, :] // 2, (j * BLOCK_O + c)[:, None]
            ptrs = grads_ptr + RU.inner_factor.grad + a * RU.inner + f
            tl.atomic_add(ptrs, dup_inner[j], mask=(a < RU.A) & (f < RU.inner), sem="relaxed")
    if dup_bias_ptr is not None:
        for j in tl.static_range(OUT_BLOCKS):
            o, f = tl.arange(0, OP)[None, :], (j * BLOCK_O + c)[:, None]
            ptrs = grads_ptr + RU.bias_grad + o * RU.inner + f
            tl.atomic_add(ptrs, dup_bias[j], mask=(o < RU.outer) & (f < RU.inner), sem="relaxed")
    if ddown_ptr is not None:
        for j in tl.static_range(IN_BLOCKS):
            pair, f = tl.arange(0, LD.CP)[None, :], (j * BLOCK_I + i)[:, None]
            ptrs = grads_ptr + LD.inner_factor.grad + (pair // LD.K * LD.inner + f) * LD.K + pair % LD.K
            tl.atomic_add(ptrs, ddown_inner[j], mask=(f < LD.inner) & (pair < LD.A * LD.K), sem="relaxed")
    if is_last(sums_ptr + AT.sums_end, programs):
        BLOCK_C: tl.constexpr = 32 if DROPOUT_P > 0 and BLOCK_N == 2 else 64  # beside masks the addresses of 64 spill
        _store_grads(
            down_ptr, up_ptr, ddown_ptr, ddown_bias_ptr, dup_ptr, dup_bias_ptr, grads_ptr, sums_ptr, scratch_ptr, total,
            LD, RD, LU, RU, AT, PRECISION, FLAT, BLOCK_C,
        )  # fmt: skip
