"""The products of a train's side with tensors of N rows, and dropout.

Low-precision rows are widened, and dropout masks drawn, for a block of rows at a time: the temporary memory is that of
one block, whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 22  # elements: what fits a core's cache; few launches


class Dropout(NamedTuple):
    """The probability that an element is dropped, and the seed that says which are."""

    p: float
    seed: Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the sums over x: fp64 for fp64, otherwise fp32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def row_blocks(
    x: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The rows of `x [N, I]` in `dtype`, block by block: where they lie, `drop(x)` there, what drop multiplied by."""
    if x.dtype is dtype and dropout is None:
        yield slice(0, len(x)), x, None
        return
    generator = dropout and torch.Generator(x.device).manual_seed(int(dropout.seed))
    for rows in _slices(x):
        block, factor = x[rows].to(dtype), None
        if dropout is not None:
            # Twice as fast on CPU as bernoulli_.
            factor = torch.rand(block.shape, dtype=dtype, device=x.device, generator=generator)
            factor.lt_(1 - dropout.p).div_(1 - dropout.p)
            block = block * factor
        yield rows, block, factor


def to_waist(x: Tensor, P: Tensor, dropout: Dropout | None = None) -> Tensor:
    """drop(x) · Pᵀ, [N, K] in P's dtype, for `x [N, I]` and `P [K, I]`."""
    if x.dtype is P.dtype and dropout is None:
        return x @ P.t()
    s = P.new_empty(len(x), len(P))
    for rows, block, _ in row_blocks(x, P.dtype, dropout):
        torch.mm(block, P.t(), out=s[rows])
    return s


def from_waist(base: Tensor | None, s: Tensor, P: Tensor, dtype: torch.dtype, lead: Sequence[int]) -> Tensor:
    """base + s · P, `[*lead, O]` in `dtype`, for `s [N, K]` and `P [K, O]`, N the product of lead.

    The result is no view: autograd forbids changing a Function's output in place when it is one, as models do.
    """
    y = P.new_empty(*lead, P.shape[1], dtype=dtype)
    rows_of_y = y.view(len(s), P.shape[1])
    for rows in [slice(None)] if _is_one_product(y, base, P) else _slices(rows_of_y):
        write_rows(rows_of_y, rows, base, s, P)
    return y


def write_rows(y: Tensor, rows: slice, base: Tensor | None, s: Tensor, P: Tensor, factor: Tensor | None = None) -> None:
    """y[rows] = base[rows] + factor · (s[rows] · P)."""
    if factor is None and _is_one_product(y, base, P):
        if base is None:
            torch.mm(s[rows], P, out=y[rows])
        else:
            torch.addmm(base[rows], s[rows], P, out=y[rows])
        return
    block = s[rows] @ P
    if factor is not None:
        block *= factor
    if base is None:
        y[rows] = block
    else:
        torch.add(base[rows], block, out=y[rows])


def append_bias(s: Tensor, R: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`s` with a column of ones and `R` with a row of biases: s · R + b as one product, and so are its gradients."""
    if bias is None:
        return s, R
    return torch.cat([s, s.new_ones(len(s), 1)], dim=1), torch.cat([R, bias.to(R.dtype)[None]])


def output_grads(dy: Tensor, s: Tensor, R: Tensor, needs_ds: bool, needs_dR: bool) -> tuple[Tensor, Tensor]:
    """ds = dy · Rᵀ and dR = sᵀ · dy, of y = s · R, in one pass over `dy [N, O]`."""
    ds = R.new_empty(len(dy), len(R))
    dR = R.new_zeros(s.shape[1], R.shape[1])
    for rows, block, _ in row_blocks(dy, R.dtype):
        if needs_ds:
            torch.mm(block, R.t(), out=ds[rows])
        if needs_dR:
            dR.addmm_(s[rows].t(), block)
    return ds, dR


def input_grads(
    x: Tensor,
    ds: Tensor,
    Lt: Tensor,
    needs_dx: bool,
    needs_dLt: bool,
    base: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = base + drop'(ds · Lᵀ) and dLᵀ = dsᵀ · drop(x), of s = drop(x) · L, in one pass over `x [N, I]`."""
    dx = x.new_empty(x.shape if needs_dx else 0)
    dLt = torch.zeros_like(Lt)
    for rows, block, factor in row_blocks(x, Lt.dtype, dropout):
        if needs_dLt:
            dLt.addmm_(ds[rows].t(), block)
        if needs_dx:
            write_rows(dx, rows, base, ds, Lt, factor)
    return dx, dLt


def _is_one_product(y: Tensor, base: Tensor | None, P: Tensor) -> bool:
    """Whether base + s · P can be written to y as it is computed, with no change of dtype."""
    return y.dtype is P.dtype and (base is None or base.dtype is y.dtype)


def _slices(x: Tensor) -> Iterator[slice]:
    """The rows of `x [N, I]` in blocks."""
    step = max(1, (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK) // x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))
