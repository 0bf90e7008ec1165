"""A tensor train as a module of an adapter."""

from __future__ import annotations

import torch

from loretta_kernels import TTShape, tt_matrix
from loretta_kernels.nn import TTLinear
from loretta_kernels.reference import tt_sides


class TensorTrain(TTLinear):
    """`TTLinear` with the initial values that adapters have."""

    def __init__(self, shape: TTShape, bias: bool = False, *, zero: bool = False, random_bias: bool = False) -> None:
        super().__init__(shape=shape, bias=bias)
        self.reset_parameters(zero=zero, random_bias=random_bias)

    def matrix(self) -> torch.Tensor:
        """W [in_features, out_features], materialised: for merging and export only."""
        return tt_matrix(self.tt)

    @torch.no_grad()
    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L [in_features, waist] and R [waist, out_features], materialised, whose product is W."""
        return tt_sides(self.cores, self.shape)
