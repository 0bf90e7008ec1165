"""A side inside a kernel: its two tables, made from the cores, a tile of it, and the sum of the tile's gradient.

tile[c, k] = sum_a light[.., a] · heavy[a, .., k]     (`side.py` has the two factors)
"""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import add_to

TABLE_BLOCK = tl.constexpr(512)
UNROLLED = tl.constexpr(16)


@triton.jit
def _product_at(e, ok, left_ptr, right_ptr, BOND: tl.constexpr, COLUMNS: tl.constexpr):
    """The elements e of left [rows, BOND] · right [BOND, COLUMNS], row-major."""
    row, column = e // COLUMNS, e % COLUMNS
    sum = tl.full(e.shape, 0, tl.float32)
    for b in range(BOND):
        left = tl.load(left_ptr + row * BOND + b, mask=ok, other=0.0).to(tl.float32)
        sum += left * tl.load(right_ptr + b * COLUMNS + column, mask=ok, other=0.0).to(tl.float32)
    return sum


@triton.jit
def _store_product(out_ptr, left_ptr, right_ptr, SIZE: tl.constexpr, BOND: tl.constexpr, COLUMNS: tl.constexpr):
    """out = left · right, SIZE elements."""
    for start in range(0, SIZE, TABLE_BLOCK):
        e = start + tl.arange(0, TABLE_BLOCK)
        tl.store(out_ptr + e, _product_at(e, e < SIZE, left_ptr, right_ptr, BOND, COLUMNS), mask=e < SIZE)


@triton.jit
def store_partials(scratch_ptr, STARTS: tl.constexpr, cores_ptr, S: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The products of the cores from LO up to each one short of the last."""
    for j in tl.static_range(LO + 1, HI - 1):
        right_ptr = cores_ptr + S.core_starts[j]
        if j == LO + 1:
            left_ptr = cores_ptr + S.core_starts[LO]
            _store_product(
                scratch_ptr + STARTS[j], left_ptr, right_ptr, S.product_size(LO, j + 1), S.ranks[j], S.columns[j]
            )
        else:
            left_ptr = scratch_ptr + STARTS[j - 1]
            _store_product(
                scratch_ptr + STARTS[j], left_ptr, right_ptr, S.product_size(LO, j + 1), S.ranks[j], S.columns[j]
            )
        tl.debug_barrier()


@triton.jit
def _factor_at(e, ok, tables_ptr, cores_ptr, S: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The elements e of the product of the cores from LO to HI, row-major."""
    last_ptr = cores_ptr + S.core_starts[HI - 1]
    if HI - LO == 1:
        return tl.load(last_ptr + e, mask=ok, other=0.0).to(tl.float32)
    elif HI - LO == 2:
        return _product_at(e, ok, cores_ptr + S.core_starts[LO], last_ptr, S.ranks[HI - 1], S.columns[HI - 1])
    else:
        return _product_at(e, ok, tables_ptr + S.partials[HI - 2], last_ptr, S.ranks[HI - 1], S.columns[HI - 1])


@triton.jit
def store_tables(tables_ptr, cores_ptr, S: tl.constexpr):
    """heavy [A, features, KS], zero beyond the waist, and light [features, A]; a barrier must follow."""
    if not S.heavy_is_core:
        store_partials(tables_ptr, tl.constexpr(S.partials), cores_ptr, S, S.heavy[0], S.heavy[1])
        for start in range(0, S.A * S.heavy_size * S.KS, TABLE_BLOCK):
            t = start + tl.arange(0, TABLE_BLOCK)
            a, i, k = t // (S.KS * S.heavy_size), t // S.KS % S.heavy_size, t % S.KS
            e = (a * S.heavy_size + i) * S.K + k if S.is_input else (k * S.heavy_size + i) * S.A + a
            ok = (a < S.A) & (k < S.K)
            heavy = S.factor * _factor_at(e, ok, tables_ptr, cores_ptr, S, S.heavy[0], S.heavy[1])
            tl.store(tables_ptr + S.heavy_table + t, heavy, mask=a < S.A)
    if S.has_light:
        store_partials(tables_ptr, tl.constexpr(S.partials), cores_ptr, S, S.light[0], S.light[1])
        for start in range(0, S.light_size * S.A, TABLE_BLOCK):
            t = start + tl.arange(0, TABLE_BLOCK)
            j, a = t // S.A, t % S.A
            e = t if S.is_input else a * S.light_size + j
            ok = j < S.light_size
            light = _factor_at(e, ok, tables_ptr, cores_ptr, S, S.light[0], S.light[1])
            tl.store(tables_ptr + S.light_table + t, light, mask=ok)


@triton.jit
def _heavy(tables_ptr, cores_ptr, a, i, ok, S: tl.constexpr):
    """heavy[a, i, :], a row of KP for each i."""
    k = tl.arange(0, S.KP)
    offs = (a * S.heavy_strides[0] + i * S.heavy_strides[1])[:, None] + (k * S.heavy_strides[2])[None, :]
    if S.heavy_is_core:
        ptrs = cores_ptr + S.core_starts[S.heavy[0]] + offs
        heavy = S.factor * tl.load(ptrs, mask=ok[:, None] & (k < S.K)[None, :], other=0.0).to(tl.float32)
    else:
        heavy = tl.load(tables_ptr + S.heavy_table + offs, mask=ok[:, None] & (k < S.KS)[None, :], other=0.0)
    return heavy


@triton.jit
def keep_heavy(tables_ptr, cores_ptr, S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The heavy rows of a block of features, for every a, where every block has the same; otherwise nothing."""
    kept: tl.tuple = ()
    if S.keeps_heavy(BLOCK_C):
        A: tl.constexpr = S.A
        i = tl.arange(0, BLOCK_C) % S.second
        for a in tl.static_range(A):
            kept = kept + (_heavy(tables_ptr, cores_ptr, a, i, i < S.second, S),)
    return kept


@triton.jit
def _term(tables_ptr, cores_ptr, a, light_i, heavy_i, ok, S: tl.constexpr):
    """light[.., a] · heavy[a, .., :]."""
    heavy = _heavy(tables_ptr, cores_ptr, a, heavy_i, heavy_i < S.heavy_size, S)
    return _light(tables_ptr, a, light_i, ok, S)[:, None] * heavy


@triton.jit
def _light(tables_ptr, a, i, ok, S: tl.constexpr):
    """light[i, a]."""
    return tl.load(tables_ptr + S.light_table + i * S.A + a, mask=ok, other=0.0)


@triton.jit
def load_tile(tables_ptr, cores_ptr, kept, c0, S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The side's features from c0, `[BLOCK_C, KP]` in fp32; zero beyond its features and its waist.

    `kept` are the rows of `keep_heavy`, or nothing where the side was not asked to keep them.
    """
    c = c0 + tl.arange(0, BLOCK_C)
    ok = c < S.size
    light_i = c // S.second if S.is_input else c % S.second
    A: tl.constexpr = S.A
    if not S.has_light:
        tile = _heavy(tables_ptr, cores_ptr, 0, c, ok, S)
    elif len(kept) > 0:
        tile = _light(tables_ptr, 0, light_i, ok, S)[:, None] * kept[0]
        for a in tl.static_range(1, A):
            tile += _light(tables_ptr, a, light_i, ok, S)[:, None] * kept[a]
    else:
        if S.shares_heavy(BLOCK_C):
            heavy_i = c0 // S.second + tl.arange(0, 1)
        else:
            heavy_i = c % S.second if S.is_input else c // S.second
        tile = _term(tables_ptr, cores_ptr, 0, light_i, heavy_i, ok, S)
        if A <= UNROLLED:
            for a in tl.static_range(1, A):
                tile += _term(tables_ptr, cores_ptr, a, light_i, heavy_i, ok, S)
        else:
            for a in range(1, A):
                tile += _term(tables_ptr, cores_ptr, a, light_i, heavy_i, ok, S)
    return tile


@triton.jit
def add_grad(grads_ptr, c, dtile, S: tl.constexpr, ATOMIC: tl.constexpr):
    """Add the gradient `[BLOCK_C, KP]` of the features c; for R with that of the bias beside the waist."""
    k = tl.arange(0, S.KP)
    LAST: tl.constexpr = S.K if S.is_input else S.K + 1
    ptrs = grads_ptr + S.grad + c[:, None] * S.grad_c + k[None, :] * S.grad_k
    add_to(ptrs, dtile, (c < S.size)[:, None] & (k < LAST)[None, :], ATOMIC)
