"""Rows of a tensor inside a kernel, at int64 addresses."""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import cast

ITEM = tl.constexpr(5)  # numbers of an item, and of a group: see `groups.Sorted.items`
GROUP = tl.constexpr(3)


@triton.jit
def block_rows(block, BLOCK_N: tl.constexpr):
    """The rows of a block, in int64."""
    return tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def item_of(items_ptr, program):
    """A program's share of a batch of different adapters: the adapter, and its rows in order, from and to."""
    item_ptr = items_ptr + program * ITEM
    return tl.cast(tl.load(item_ptr), tl.int64), tl.load(item_ptr + 1), tl.load(item_ptr + 2)


@triton.jit
def group_of(items_ptr, program):
    """Which of the adapters in use that is, and how many programs take its rows."""
    item_ptr = items_ptr + program * ITEM
    return tl.cast(tl.load(item_ptr + 3), tl.int64), tl.load(item_ptr + 4)


@triton.jit
def item_rows(order_ptr, first, last, N, BLOCK_N: tl.constexpr):
    """The rows in order from first on, in int64; N, which is no row, from last on."""
    at = first + tl.arange(0, BLOCK_N)
    return tl.load(order_ptr + at, mask=at < last, other=N)


@triton.jit
def copy_rows(
    out_ptr, base_ptr, order_ptr, first, last, part, parts, N, stride, SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The rows in order from first to last as they are in base, or 0 without; `parts` programs share the features."""
    for start in range(first, last, BLOCK_N):
        rows = item_rows(order_ptr, start, last, N, BLOCK_N)
        for c0 in range(part * BLOCK_C, SIZE, parts * BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            value = tl.full([BLOCK_N, BLOCK_C], 0, tl.float32)
            if base_ptr is not None:
                value = load_rows(base_ptr, rows, stride, c, N, SIZE).to(tl.float32)
            store_rows(out_ptr, rows, SIZE, c, N, SIZE, value)


@triton.jit
def load_rows(ptr, rows, stride, c, N, SIZE: tl.constexpr):
    """The features c of the rows, zero beyond N rows and SIZE features."""
    ok = (rows < N)[:, None] & (c < SIZE)[None, :]
    return tl.load(ptr + rows[:, None] * stride + c[None, :], mask=ok, other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, c, N, SIZE: tl.constexpr, value):
    """Store the features c of the rows in the tensor's dtype."""
    ok = (rows < N)[:, None] & (c < SIZE)[None, :]
    tl.store(ptr + rows[:, None] * stride + c[None, :], cast(value, ptr.dtype.element_ty), mask=ok)


@triton.jit
def ones_beside(s, K: tl.constexpr):
    """s with a column of ones beside its waist: its product with dy is then the gradient of the bias too."""
    return tl.where((tl.arange(0, s.shape[1]) == K)[None, :], 1.0, s)
