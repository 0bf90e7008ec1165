"""A tensor train as a module: one flat parameter, its shape, and an optional bias."""

from __future__ import annotations

import math

import torch
from torch import nn

from loretta_kernels import TTShape, tt_linear, tt_matrix


class TensorTrain(nn.Module):
    """``y = x·W + bias``, where W [in_features, out_features] is a tensor train.

    Args:
        shape: modes and ranks of W.
        bias: add a bias [out_features].
        zero: start with W = 0, by a last core of zeros.
        random_bias: start with a random bias instead of zeros.

    Attributes:
        cores: flat parameter [shape.num_params]: core after core, each row-major [r, n, r'].
        bias: parameter [out_features], or None.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: TTShape, bias: bool = False, *, zero: bool = False, random_bias: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.cores = nn.Parameter(torch.empty(shape.num_params))
        self.bias = nn.Parameter(torch.empty(shape.out_features)) if bias else None
        self.reset_parameters(zero=zero, random_bias=random_bias)

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    @torch.no_grad()
    def reset_parameters(self, zero: bool = False, random_bias: bool = False) -> None:
        """Draw every core from one normal distribution, such that W's entries have variance 1 / in_features.

        An entry of W is a sum over all bonds of products of one entry per core, so with d cores of variance v its
        variance is ``v^d · prod(bond ranks)``.

        Args:
            zero: set the last core to zero, so that W = 0 while every other core keeps its scale.
            random_bias: draw the bias too, instead of setting it to zero.
        """
        paths = math.prod(self.shape.bond_ranks)
        variance = (1 / (self.in_features * paths)) ** (1 / len(self.shape.modes))
        nn.init.normal_(self.cores, std=math.sqrt(variance))
        if zero:
            rank, mode, _ = self.shape.core_shapes[-1]
            self.cores[-rank * mode :] = 0
        if self.bias is not None:
            if random_bias:
                nn.init.normal_(self.bias, std=0.02)
            else:
                nn.init.zeros_(self.bias)

    def matrix(self) -> torch.Tensor:
        """W [in_features, out_features], materialised: for merging and export only."""
        return tt_matrix(self.cores, self.shape)

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L [in_features, waist] and R [waist, out_features], the two sides of the cut: W = L·R."""
        sizes, shapes, cut = self.shape.core_sizes, self.shape.core_shapes, self.shape.cut
        cores = [core.view(shape) for core, shape in zip(self.cores.split(sizes), shapes, strict=True)]
        left = right = self.cores.new_ones(1, 1)
        for core in cores[:cut]:
            left = (left @ core.flatten(1)).reshape(-1, core.shape[2])
        for core in reversed(cores[cut:]):
            right = (core.flatten(0, 1) @ right).reshape(core.shape[0], -1)
        return left, right

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The dense layer that this train stands for."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.matrix().T.to(dtype).contiguous())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype).clone())
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        return tt_linear(x, self.cores, self.shape, self.bias)

    def extra_repr(self) -> str:
        i, o = self.shape.in_modes, self.shape.out_modes
        return f"{list(i)} x {list(o)}, ranks={list(self.shape.bond_ranks)}, bias={self.bias is not None}"
