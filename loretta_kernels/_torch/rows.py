"""The products of a train's side with tensors of N rows, and dropout.

Rows are processed a block at a time: a block that its first product loads into the cache is still there for its second.
16-bit rows are widened, and dropout masks drawn, for one block at a time too, so temporary memory does not grow with N.

Which layouts are fast on CPU: a wide operand must be read along its rows of I or O elements, and be the second factor.
`sᵀ · x` is 8 times faster than `xᵀ · s`; `Lt · xᵀ` 3 times than `x · L`, and 1.5 times than `x · Ltᵀ` where x comes
from memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from loretta_kernels.philox import dropout_factor

CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 22  # elements: fits a CPU core's cache; keeps launches on a GPU few
LEAST_ROWS = 16  # in a block of very long rows: a call for each row would cost more than it computes


class Dropout(NamedTuple):
    """The probability that an element is dropped, and the seed that decides which are."""

    p: float
    seed: Tensor


def block_rows(x: Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> int:
    """How many rows of `x [N, I]` make a block: on a GPU all of them where that costs no temporary memory."""
    if x.device.type == "cpu":
        return max(LEAST_ROWS, CPU_BLOCK // x.shape[1])
    if x.dtype is dtype and dropout is None:
        return max(1, len(x))
    return max(LEAST_ROWS, GPU_BLOCK // x.shape[1])


def row_blocks(x: Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The blocks of `x [N, I]` in order: drop(x) in `dtype`, and what drop multiplied by."""
    first_row = 0
    for rows in _split(x, block_rows(x, dtype, dropout)):
        block, factor = rows if rows.dtype is dtype else rows.to(dtype), None
        if dropout is not None:
            factor = dropout_factor(dropout.seed, first_row, len(block), block.shape[1], dropout.p, dtype)
            block = block * factor
            first_row += len(block)
        yield block, factor


def to_waist(x: Tensor, Lt: Tensor, dropout: Dropout | None = None) -> Tensor:
    """drop(x) · Ltᵀ, `[N, K]`, for `x [N, I]` and `Lt [K, I]`."""
    st, step = Lt.new_empty(len(Lt), len(x)), block_rows(x, Lt.dtype, dropout)
    for (block, _), part in zip(row_blocks(x, Lt.dtype, dropout), _split(st, step, dim=1), strict=True):
        torch.mm(Lt, block.t(), out=part)
    return st.t().contiguous()


def from_waist(y: Tensor, base: Tensor | None, s: Tensor, R: Tensor) -> None:
    """y = base + s · R, for `y [N, O]`, `s [N, K]` and `R [K, O]`."""
    step = block_rows(y, R.dtype)
    for part, base_part, s_part in zip(_split(y, step), _blocks_of(base, step), _split(s, step), strict=False):
        _write(part, base_part, s_part, R)


def output_grads(
    dy: Tensor, s: Tensor, R: Tensor, needs_ds: bool, needs_dR: bool
) -> tuple[Tensor | None, Tensor | None]:
    """ds = dy · Rᵀ, `[N, K]`, and dR = sᵀ · dy, of y = s · R, in one pass over `dy [N, O]`.

    s may have more columns than R has rows: a column of ones gives the gradient of a bias.
    """
    step = block_rows(dy, R.dtype)
    dst = R.new_empty(len(R), len(dy)) if needs_ds else None
    dR = R.new_zeros(s.shape[1], R.shape[1]) if needs_dR else None
    parts = _blocks_of(dst, step, dim=1), _split(s.t(), step, dim=1)
    for (block, _), dst_part, st_part in zip(row_blocks(dy, R.dtype), *parts, strict=False):
        if dst_part is not None:
            torch.mm(R, block.t(), out=dst_part)
        if dR is not None:
            dR.addmm_(st_part, block)
    return None if dst is None else dst.t(), dR


def input_grads(
    x: Tensor,
    ds: Tensor,
    Lt: Tensor,
    needs_dx: bool,
    needs_dLt: bool,
    base: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = base + drop'(ds · Lt) and dLt = dsᵀ · drop(x), of s = drop(x) · Ltᵀ, in one pass over `x [N, I]`."""
    step = block_rows(x, Lt.dtype, dropout)
    dx = x.new_empty(x.shape) if needs_dx else None
    dLt = torch.zeros_like(Lt) if needs_dLt else None
    parts = _blocks_of(dx, step), _blocks_of(base, step), _split(ds, step)
    for (block, factor), dx_part, base_part, ds_part in zip(row_blocks(x, Lt.dtype, dropout), *parts, strict=False):
        if dLt is not None:
            dLt.addmm_(ds_part.t(), block)
        if dx_part is not None:
            _write(dx_part, base_part, ds_part, Lt, factor)
    return dx, dLt


def _write(y: Tensor, base: Tensor | None, s: Tensor, P: Tensor, factor: Tensor | None = None) -> None:
    """y = base + factor · (s · P), computed in place where no dtype changes on the way."""
    if factor is None and y.dtype is P.dtype and (base is None or base.dtype is y.dtype):
        if base is None:
            torch.mm(s, P, out=y)
        else:
            torch.addmm(base, s, P, out=y)
        return
    block = s @ P
    if factor is not None:
        block *= factor
    if base is None:
        y.copy_(block)
    else:
        torch.add(base, block, out=y)


def _split(x: Tensor, step: int, dim: int = 0) -> tuple[Tensor, ...]:
    """The blocks of x."""
    return (x,) if x.shape[dim] <= step else x.split(step, dim)


def _blocks_of(x: Tensor | None, step: int, dim: int = 0) -> Iterator[Tensor | None]:
    """The blocks of x, or an endless sequence of None."""
    return repeat(None) if x is None else iter(_split(x, step, dim))
