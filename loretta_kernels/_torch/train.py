"""The two sides of a tensor train, and the way back from their gradients to those of the cores.

    W = L · R,   L [I, K] the product of the input cores,   R [K, O] that of the output cores

L is given as its transpose `Lt [K, I]`, and for more than a few rows of x it is also stored K-major, as R is: a product
with x then reads whole rows, which on CPU is 3 to 8 times faster than the other layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels.shape import TTShape

FEW_ROWS = 8


class Train:
    """`Lt` and `R` of the train that `cores` and `shape` describe, contracted in `dtype` for products with N rows."""

    def __init__(self, cores: Tensor, shape: TTShape, dtype: torch.dtype, N: int) -> None:
        cores = cores.to(dtype).contiguous()
        start, matrices = cores.storage_offset(), []
        for r, n, r_next in shape.core_shapes:
            # One call where split and view would be two: with few rows the calls are what costs.
            matrices.append(cores.as_strided((r, n * r_next), (n * r_next, 1), start))
            start += r * n * r_next
        cut, K = shape.cut, shape.waist
        self._in_matrices, self._out_matrices = matrices[:cut], matrices[cut:]
        self._in_partials = _partials(self._in_matrices, shape.bond_ranks[1:cut])
        self._out_partials = _partials(self._out_matrices, shape.bond_ranks[cut + 1 : -1])
        Lt = _product(self._in_matrices, self._in_partials).view(shape.in_features, K).t()
        self.Lt = Lt if N < FEW_ROWS else Lt.contiguous()
        self.R = _product(self._out_matrices, self._out_partials).view(K, shape.out_features)

    def dcores(self, dLt: Tensor, dR: Tensor) -> Tensor:
        """The gradient of the flat cores."""
        return torch.cat(
            _core_grads(self._in_matrices, self._in_partials, dLt.t())
            + _core_grads(self._out_matrices, self._out_partials, dR)
        )


def _partials(matrices: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """The products `[r(0)·n(1)···n(j), r(j)]` of a side's first j cores, for every j short of them all."""
    partials: list[Tensor] = []
    for matrix, rank in zip(matrices, ranks, strict=False):
        partials.append(_product([matrix], partials).view(-1, rank))
    return partials


def _product(matrices: Sequence[Tensor], partials: Sequence[Tensor]) -> Tensor:
    """The last partial product times the last core."""
    return partials[-1].mm(matrices[-1]) if partials else matrices[-1]


def _core_grads(matrices: Sequence[Tensor], partials: Sequence[Tensor], d: Tensor) -> list[Tensor]:
    """The flat gradients of a side's cores, from that of its product."""
    grads = []
    for matrix, partial in zip(matrices[:0:-1], partials[::-1], strict=True):
        d = d.reshape(-1, matrix.shape[1])
        grads.append(partial.t().mm(d).view(-1))
        d = d.mm(matrix.t())
    grads.append(d.reshape(-1))
    return grads[::-1]
