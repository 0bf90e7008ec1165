"""The factors of a side (`row_side.py`) inside a kernel: products of cores in a program's tables, and tiles of them."""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import dot

TILE = tl.constexpr(128)


@triton.jit
def _operands(tables_ptr, cores_ptr, tile, S: tl.constexpr, FIRST: tl.constexpr, J: tl.constexpr):
    """Where a tile of the product of the cores from FIRST to J goes, and its two operands."""
    R: tl.constexpr = S.ranks[J]
    ROWS: tl.constexpr = S.product_rows(FIRST, J)
    COLUMNS: tl.constexpr = S.columns[J]
    M: tl.constexpr = min(TILE, max(16, triton.next_power_of_2(ROWS)))
    N: tl.constexpr = min(TILE, max(16, triton.next_power_of_2(COLUMNS)))
    left_ptr = cores_ptr + S.core_starts[FIRST] if J - FIRST == 1 else tables_ptr + S.products[J - 1]
    right_ptr = cores_ptr + S.core_starts[J]
    m = (tile // tl.cdiv(COLUMNS, N) * M + tl.arange(0, M))[:, None]
    n = (tile % tl.cdiv(COLUMNS, N) * N + tl.arange(0, N))[None, :]
    r = tl.arange(0, max(16, triton.next_power_of_2(R)))
    left = tl.load(left_ptr + m * R + r[None, :], mask=(m < ROWS) & (r < R)[None, :], other=0.0)
    right = tl.load(right_ptr + r[:, None] * COLUMNS + n, mask=(r < R)[:, None] & (n < COLUMNS), other=0.0)
    out_ptrs = tables_ptr + S.products[J] + m * COLUMNS + n
    return out_ptrs, (m < ROWS) & (n < COLUMNS), left.to(tl.float32), right.to(tl.float32)


@triton.jit
def _store(product):
    """Multiply and store."""
    ptrs, ok, left, right = product
    out = dot(left, right, tl.full([left.shape[0], right.shape[1]], 0, tl.float32), "tf32x3")
    tl.store(ptrs, out, mask=ok)


@triton.jit
def _first_tile(tables_ptr, cores_ptr, S: tl.constexpr, LEVEL: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr):
    """The first tile of the product of the first LEVEL + 1 cores of a factor; none where it has not so many."""
    found: tl.tuple = ()
    if FIRST + LEVEL < END:
        found = (_operands(tables_ptr, cores_ptr, 0, S, FIRST, FIRST + LEVEL),)
    return found


@triton.jit
def _store_tiles(
    first, tables_ptr, cores_ptr, S: tl.constexpr, LEVEL: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr
):
    """Store what `_first_tile` began."""
    J: tl.constexpr = FIRST + LEVEL
    if J < END:
        _store(first[0])
        for tile in range(1, tl.cdiv(S.product_rows(FIRST, J), TILE) * tl.cdiv(S.columns[J], TILE)):
            _store(_operands(tables_ptr, cores_ptr, tile, S, FIRST, J))


@triton.jit
def store_products(
    tables_ptr, down_ptr, up_ptr, LD: tl.constexpr, RD: tl.constexpr, LU: tl.constexpr, RU: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """The products of cores that are factors; all that one level needs is loaded before any of it is multiplied."""
    for level in tl.static_range(1, LEVELS):
        down_outer = _first_tile(tables_ptr, down_ptr, LD, level, 0, LD.split)
        down_inner = _first_tile(tables_ptr, down_ptr, LD, level, LD.split, LD.count)
        up_outer = _first_tile(tables_ptr, up_ptr, RU, level, 0, RU.split)
        up_inner = _first_tile(tables_ptr, up_ptr, RU, level, RU.split, RU.count)
        if RD is not None:
            down_whole = _first_tile(tables_ptr, down_ptr, RD, level, 0, RD.count)
            up_whole = _first_tile(tables_ptr, up_ptr, LU, level, 0, LU.count)
            _store_tiles(down_whole, tables_ptr, down_ptr, RD, level, 0, RD.count)
            _store_tiles(up_whole, tables_ptr, up_ptr, LU, level, 0, LU.count)
        _store_tiles(down_outer, tables_ptr, down_ptr, LD, level, 0, LD.split)
        _store_tiles(down_inner, tables_ptr, down_ptr, LD, level, LD.split, LD.count)
        _store_tiles(up_outer, tables_ptr, up_ptr, RU, level, 0, RU.split)
        _store_tiles(up_inner, tables_ptr, up_ptr, RU, level, RU.split, RU.count)
        tl.debug_barrier()


@triton.jit
def _at(tables_ptr, cores_ptr, offs, ok, S: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr):
    """Elements of the product of the cores from FIRST to END."""
    if END - FIRST == 1:
        value = tl.load(cores_ptr + S.core_starts[FIRST] + offs, mask=ok, other=0.0).to(tl.float32)
    else:
        value = tl.load(tables_ptr + S.products[END - 1] + offs, mask=ok, other=0.0)
    return value


@triton.jit
def load_outer(tables_ptr, cores_ptr, S: tl.constexpr):
    """The outer factor: [o, a] of L, [k, (o, a)] of R; zero beyond its sizes."""
    if S.is_input:
        o, a = tl.arange(0, S.OP)[:, None], tl.arange(0, S.AP)[None, :]
        offs, ok = o * S.A + a, (o < S.outer) & (a < S.A)
    else:
        k, oa = tl.arange(0, S.QP)[:, None], tl.arange(0, S.OP * S.AP)[None, :]
        o, a = oa // S.AP, oa % S.AP
        offs, ok = (k * S.outer + o) * S.A + a, (k < S.K) & (o < S.outer) & (a < S.A)
    outer = _at(tables_ptr, cores_ptr, offs, ok, S, 0, S.split)
    return outer if S.is_input else outer * S.factor


@triton.jit
def load_inner(tables_ptr, cores_ptr, i, S: tl.constexpr):
    """The inner factor: [i, (a, k)] of L, [(a, twice), i] of R; zero beyond its sizes."""
    if S.is_input:
        ak = tl.arange(0, S.AP * S.QP)[None, :]
        a, k = ak // S.QP, ak % S.QP
        offs, ok = (a * S.inner + i[:, None]) * S.K + k, (i < S.inner)[:, None] & (a < S.A) & (k < S.K)
    else:
        a = tl.arange(0, 2 * S.AP)[:, None] // 2
        offs, ok = a * S.inner + i[None, :], (i < S.inner)[None, :] & (a < S.A)
    inner = _at(tables_ptr, cores_ptr, offs, ok, S, S.split, S.count)
    return inner * S.factor if S.is_input else inner


@triton.jit
def load_packed_outer(tables_ptr, cores_ptr, S: tl.constexpr):
    """The outer factor at every pair c = (a, k): [o, c], the same for every k of L; zero beyond its sizes."""
    o, c = tl.arange(0, S.OP)[:, None], tl.arange(0, S.CP)[None, :]
    a, k = c // S.K, c % S.K
    offs = o * S.A + a if S.is_input else (k * S.outer + o) * S.A + a
    outer = _at(tables_ptr, cores_ptr, offs, (o < S.outer) & (a < S.A), S, 0, S.split)
    return outer if S.is_input else outer * S.factor


@triton.jit
def load_packed_inner(tables_ptr, cores_ptr, i, S: tl.constexpr):
    """The inner factor at every pair c = (a, k): [i, c], the same for every k of R; zero beyond its sizes."""
    c = tl.arange(0, S.CP)[None, :]
    a, k = c // S.K, c % S.K
    offs = a * S.inner + i[:, None]
    offs = offs * S.K + k if S.is_input else offs
    inner = _at(tables_ptr, cores_ptr, offs, (i < S.inner)[:, None] & (a < S.A), S, S.split, S.count)
    return inner * S.factor if S.is_input else inner


@triton.jit
def load_whole(tables_ptr, cores_ptr, S: tl.constexpr):
    """A side that is not cut, [k, features]; zero beyond its sizes."""
    k, c = tl.arange(0, S.QP)[:, None], tl.arange(0, S.IP)[None, :]
    offs = c * S.K + k if S.is_input else k * S.size + c
    return S.factor * _at(tables_ptr, cores_ptr, offs, (k < S.K) & (c < S.size), S, 0, S.count)
