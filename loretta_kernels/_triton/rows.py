"""Rows of a tensor inside a kernel, at int64 addresses."""

from __future__ import annotations

import triton
import triton.language as tl

from loretta_kernels._triton._common import cast


@triton.jit
def block_rows(block, BLOCK_N: tl.constexpr):
    """The rows of a block, in int64."""
    return tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


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
