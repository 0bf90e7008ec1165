"""The products of a train's side with tensors of N rows, and dropout.

A block of rows at a time: what its first product brings into the cache is still there for its second, and a chunk of
some blocks goes through an operator whole before the next is read. Rows of low precision are widened, and dropout
masks drawn, for one block too: temporary memory is that of a block, whatever N is.

Which layouts are fast: a wide operand must be read along its rows of I or O elements. `x · Ltᵀ` and `sᵀ · x` are, on
CPU, 3 to 8 times faster than `x · L` and `xᵀ · s`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 22  # elements: what fits a core's cache; few launches
CHUNK = 8  # blocks
LEAST_ROWS = 16  # of a block, where rows are so long that a call for each would show


class Dropout:
    """The masks of one pass over x, a block after the other.

    Args:
        p: the probability that an element is dropped, to the nearest 1/65536.
        seed: which elements are.
        device: that of x.
    """

    def __init__(self, p: float, seed: Tensor, device: torch.device) -> None:
        self.p = p
        self.generator = torch.Generator(device).manual_seed(int(seed))


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


def chunks(x: Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> Iterator[slice]:
    """The rows of `x [N, I]` in chunks of whole blocks; on a GPU in one."""
    step = CHUNK * block_rows(x, dtype, dropout) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, max(1, len(x)), step):  # one of no rows, too
        yield slice(start, start + step)


def row_blocks(x: Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The blocks of `x [N, I]` in order: drop(x) in `dtype`, and what drop multiplied by."""
    for rows in _split(x, block_rows(x, dtype, dropout)):
        block, factor = rows.to(dtype), None
        if dropout is not None:
            factor = _dropout_factor(block, dropout)
            block = block * factor
        yield block, factor


def to_waist(x: Tensor, Lt: Tensor, s: Tensor, dropout: Dropout | None = None) -> None:
    """s = drop(x) · Ltᵀ, `[N, K]`, for `x [N, I]` and `Lt [K, I]`."""
    L, step = Lt.t(), block_rows(x, Lt.dtype, dropout)
    for (block, _), part in zip(row_blocks(x, Lt.dtype, dropout), _split(s, step), strict=True):
        torch.mm(block, L, out=part)


def from_waist(y: Tensor, base: Tensor | None, s: Tensor, R: Tensor) -> None:
    """y = base + s · R, for `y [N, O]`, `s [N, K]` and `R [K, O]`."""
    step = block_rows(y, R.dtype)
    for part, base_part, s_part in zip(_split(y, step), _blocks_of(base, step), _split(s, step), strict=False):
        _write(part, base_part, s_part, R)


def output_grads(ds: Tensor | None, dR: Tensor | None, dy: Tensor, s: Tensor, R: Tensor) -> None:
    """ds = dy · Rᵀ, `[N, K]`, and dR += sᵀ · dy, of y = s · R, in one pass over `dy [N, O]`.

    s may have more columns than R has rows: a column of ones gives the gradient of a bias.
    """
    Rt, step = R.t(), block_rows(dy, R.dtype)
    for (block, _), ds_part, s_part in zip(
        row_blocks(dy, R.dtype), _blocks_of(ds, step), _split(s, step), strict=False
    ):
        if ds_part is not None:
            torch.mm(block, Rt, out=ds_part)
        if dR is not None:
            dR.addmm_(s_part.t(), block)


def input_grads(
    dx: Tensor | None,
    dLt: Tensor | None,
    base: Tensor | None,
    x: Tensor,
    ds: Tensor,
    Lt: Tensor,
    dropout: Dropout | None = None,
) -> None:
    """dx = base + drop'(ds · Lt) and dLt += dsᵀ · drop(x), of s = drop(x) · Ltᵀ, in one pass over `x [N, I]`."""
    step = block_rows(x, Lt.dtype, dropout)
    parts = _blocks_of(dx, step), _blocks_of(base, step), _split(ds, step)
    for (block, factor), dx_part, base_part, ds_part in zip(row_blocks(x, Lt.dtype, dropout), *parts, strict=False):
        if dLt is not None:
            dLt.addmm_(ds_part.t(), block)
        if dx_part is not None:
            _write(dx_part, base_part, ds_part, Lt, factor)


def with_ones(s: Tensor) -> Tensor:
    """`s [N, K]` and a column of ones, for a bias among the rows that s is multiplied by."""
    return torch.cat([s, s.new_ones(len(s), 1)], dim=1)


def with_bias(R: Tensor, bias: Tensor) -> Tensor:
    """`R [K, O]` and the bias as its last row."""
    return torch.cat([R, bias.to(R.dtype)[None]])


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


def _split(x: Tensor, step: int) -> tuple[Tensor, ...]:
    """The blocks of x."""
    return (x,) if len(x) <= step else x.split(step)


def _blocks_of(x: Tensor | None, step: int) -> Iterator[Tensor | None]:
    """The blocks of x, or Nones for ever."""
    return repeat(None) if x is None else iter(_split(x, step))


def _dropout_factor(block: Tensor, dropout: Dropout) -> Tensor:
    """What dropout multiplies a block by. Four elements share a draw of 64 bits: drawing is what costs."""
    n = block.numel()
    draws = torch.empty(-(-n // 4), dtype=torch.int64, device=block.device)
    draws.random_(-(2**63), None, generator=dropout.generator)
    chances = draws.view(torch.int16)[:n].view(block.shape)
    threshold = min(round(dropout.p * 2**16), 2**16 - 1) - 2**15
    return torch.ge(chances, threshold, out=torch.empty_like(block)).div_(1 - dropout.p)
