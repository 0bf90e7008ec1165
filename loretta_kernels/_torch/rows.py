"""The products of a train's side with tensors of N rows, and dropout.

A block of rows at a time: what its first product brings into the cache is still there for its second. Rows of low
precision are widened, and dropout masks drawn, for one block too: temporary memory is that of a block, whatever N is.

Which layouts are fast: a wide operand must be read along its rows of I or O elements. `Lᵀ · xᵀ` and `sᵀ · x` are, on
CPU, 3 to 8 times faster than `x · L` and `xᵀ · s`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 22  # elements: what fits a core's cache; few launches
LEAST_ROWS = 16  # of a block, where rows are so long that a call for each would show


class Dropout(NamedTuple):
    """The probability that an element is dropped, to the nearest 1/65536, and the seed that says which are."""

    p: float
    seed: Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the sums over x: fp64 for fp64, otherwise fp32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def block_rows(x: Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> int:
    """How many rows of `x [N, I]` make a block: on a GPU all of them where that costs no temporary memory."""
    if x.device.type == "cpu":
        return max(LEAST_ROWS, CPU_BLOCK // x.shape[1])
    if x.dtype is dtype and dropout is None:
        return max(1, len(x))
    return max(LEAST_ROWS, GPU_BLOCK // x.shape[1])


def row_blocks(x: Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The blocks of `x [N, I]` in order: drop(x) in `dtype`, and what drop multiplied by."""
    generator = dropout and torch.Generator(x.device).manual_seed(int(dropout.seed))
    for rows in x.split(block_rows(x, dtype, dropout)):
        block, factor = rows.to(dtype), None
        if dropout is not None:
            factor = _dropout_factor(block, dropout.p, generator)
            block = block * factor
        yield block, factor


def to_waist(x: Tensor, L: Tensor, dropout: Dropout | None = None) -> Tensor:
    """drop(x) · L, [N, K] in L's dtype, for `x [N, I]` and `L [I, K]`."""
    Lt = L.t()
    st = L.new_empty(len(Lt), len(x))
    parts = st.split(block_rows(x, L.dtype, dropout), dim=1)
    for (block, _), part in zip(row_blocks(x, L.dtype, dropout), parts, strict=True):
        torch.mm(Lt, block.t(), out=part)
    return st.t().contiguous()


def from_waist(
    base: Tensor | None, s: Tensor, R: Tensor, bias: Tensor | None, dtype: torch.dtype, lead: Sequence[int]
) -> Tensor:
    """base + s · R + bias, `[*lead, O]` in `dtype`, for `s [N, K]` and `R [K, O]`, N the product of lead.

    The result is no view: autograd forbids changing a Function's output in place when it is one, as models do.
    """
    y = R.new_empty(*lead, R.shape[1], dtype=dtype)
    rows_of_y = y.view(len(s), R.shape[1])
    step = block_rows(rows_of_y, R.dtype)
    parts = rows_of_y.split(step), _split(base, step), s.split(step)
    for part, base_part, s_part in zip(*parts, strict=False):
        _write(part, base_part, s_part, R, bias)
    return y


def output_grads(dy: Tensor, s: Tensor, R: Tensor, needs_ds: bool, needs_dR: bool) -> tuple[Tensor, Tensor]:
    """ds = dy · Rᵀ, `[N, K]`, and dR = sᵀ · dy, of y = s · R, in one pass over `dy [N, O]`.

    s may have more columns than R has rows: a column of ones gives the gradient of a bias.
    """
    dst = R.new_empty(len(R), len(dy))
    dR = R.new_zeros(s.shape[1], R.shape[1])
    step = block_rows(dy, R.dtype)
    for (block, _), ds_part, s_part in zip(row_blocks(dy, R.dtype), dst.split(step, dim=1), s.split(step), strict=True):
        if needs_ds:
            torch.mm(R, block.t(), out=ds_part)
        if needs_dR:
            dR.addmm_(s_part.t(), block)
    return dst.t(), dR


def input_grads(
    x: Tensor,
    ds: Tensor,
    L: Tensor,
    needs_dx: bool,
    needs_dL: bool,
    base: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = base + drop'(ds · Lᵀ) and dLᵀ = dsᵀ · drop(x), of s = drop(x) · L, in one pass over `x [N, I]`."""
    Lt = L.t()
    dx = x.new_empty(x.shape if needs_dx else 0)
    dLt = L.new_zeros(Lt.shape)
    step = block_rows(x, L.dtype, dropout)
    parts = _split(dx if needs_dx else None, step), _split(base, step), ds.split(step)
    for (block, factor), dx_part, base_part, ds_part in zip(row_blocks(x, L.dtype, dropout), *parts, strict=False):
        if needs_dL:
            dLt.addmm_(ds_part.t(), block)
        if dx_part is not None:
            _write(dx_part, base_part, ds_part, Lt, None, factor)
    return dx, dLt


def _write(
    y: Tensor, base: Tensor | None, s: Tensor, P: Tensor, bias: Tensor | None, factor: Tensor | None = None
) -> None:
    """y = base + factor · (s · P) + bias, computed in place where no dtype changes on the way."""
    if factor is None and y.dtype is P.dtype and (base is None or base.dtype is y.dtype):
        if base is not None and bias is not None:
            torch.add(base, bias, out=y).addmm_(s, P)
        elif (addend := bias if base is None else base) is not None:
            torch.addmm(addend, s, P, out=y)
        else:
            torch.mm(s, P, out=y)
        return
    block = s @ P if bias is None else torch.addmm(bias, s, P)
    if factor is not None:
        block *= factor
    if base is None:
        y.copy_(block)
    else:
        torch.add(base, block, out=y)


def _split(x: Tensor | None, step: int) -> Iterator[Tensor | None]:
    """The blocks of x, or Nones for ever."""
    return repeat(None) if x is None else iter(x.split(step))


def _dropout_factor(block: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """What dropout multiplies a block by. Four elements share a draw of 64 bits: drawing is what costs."""
    n = block.numel()
    draws = torch.empty(-(-n // 4), dtype=torch.int64, device=block.device).random_(-(2**63), None, generator=generator)
    chances = draws.view(torch.int16)[:n].view(block.shape)
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    return torch.ge(chances, threshold, out=torch.empty_like(block)).div_(1 - p)
