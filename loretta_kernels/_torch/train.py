"""The two sides of a tensor train, and the way back from their gradients to those of the cores.

W = L · R,   L [I, K] the product of the input cores,   R [K, O] that of the output cores
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loretta_kernels.shape import TTShape

_latest = WeakTensorKeyDictionary()


def contract(cores: Tensor, shape: TTShape, dtype: torch.dtype) -> Train:
    """The train that `cores [num_params]` and `shape` describe, contracted in `dtype`.

    On CPU the latest contraction of a tensor is kept as long as the tensor lives: backward needs it again, and so does
    every forward with the same cores. It serves while the cores are equal to those it was made of, element by element:
    version counters do not see every write (`.data`, NumPy, custom optimisers).
    """
    if cores.device.type != "cpu":
        return Train(cores, shape, dtype)
    train = _latest.get(cores)
    if train is None or not train.is_of(cores, shape, dtype):
        train = _latest[cores] = Train(cores, shape, dtype)
    return train


class Train:
    """L, stored as its transpose `Lt`, and R of the train that a copy of `cores` and `shape` describe."""

    def __init__(self, cores: Tensor, shape: TTShape, dtype: torch.dtype) -> None:
        self._shape, self._cores = shape, cores.detach().to(dtype, copy=True).contiguous()
        start, matrices = 0, []
        for r, n, r_next in shape.core_shapes:
            # One call where split and view would be two: with few rows the calls are what costs.
            matrices.append(self._cores.as_strided((r, n * r_next), (n * r_next, 1), start))
            start += r * n * r_next
        cut, K = shape.cut, shape.waist
        self._in_matrices, self._out_matrices = matrices[:cut], matrices[cut:]
        self._in_partials = _partials(self._in_matrices, shape.bond_ranks[1:cut])
        self._out_partials = _partials(self._out_matrices, shape.bond_ranks[cut + 1 : -1])
        self.Lt = _product(self._in_matrices, self._in_partials).view(shape.in_features, K).t().contiguous()
        self.L = self.Lt.t()
        self.R = _product(self._out_matrices, self._out_partials).view(K, shape.out_features)

    def is_of(self, cores: Tensor, shape: TTShape, dtype: torch.dtype) -> bool:
        """Whether these cores, of this shape and in this dtype, are what the train was made of."""
        known = self._cores
        return shape == self._shape and dtype is known.dtype and torch.equal(cores.to(dtype), known)

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
