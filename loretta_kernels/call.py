"""One call of the one operator."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from loretta_kernels.shape import TTShape


class Call(NamedTuple):
    """y = residual + scale · learnt_scale · (act(drop(x) · W_down + b_down) · W_up + b_up).

    Without a second train, that is `up_shape` None, y = residual + scale · learnt_scale · (drop(x) · W_down + b_down).

    Attributes:
        x: `[..., I]`.
        down, up: flat cores.
        down_bias, up_bias: `[down_shape.out_features]` and `[up_shape.out_features]`.
        learnt_scale: one element.
        seed: one int64 element; None without dropout.
        residual: `[..., O]` where it is neither x nor 0.
        adapter: of stacked adapters, that is where all parameters and the learnt scale have one dimension more, the
            first: which of them each element of x's first dimensions uses, int64 or int32; -1 for none.
        residual_is_x, scale, activation, dropout_p: as of the public functions.
    """

    x: Tensor
    down: Tensor
    down_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    learnt_scale: Tensor | None
    seed: Tensor | None
    residual: Tensor | None
    adapter: Tensor | None
    down_shape: TTShape
    up_shape: TTShape | None
    residual_is_x: bool = False
    scale: float = 1.0
    activation: str = "identity"
    dropout_p: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The operands."""
        return self[:9]

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The operands whose gradients the backward computes; that of the residual is dy."""
        return self[:6]

    @property
    def out_features(self) -> int:
        """Features of y."""
        return (self.up_shape or self.down_shape).out_features

    @property
    def rows_each(self) -> int:
        """Rows for which an element of the index stands."""
        return 1 if self.adapter is None else prod(self.x.shape[self.adapter.dim() : -1])

    @property
    def y_dtype(self) -> torch.dtype:
        """The dtype to which x and the residual promote."""
        return self.x.dtype if self.residual is None else torch.promote_types(self.x.dtype, self.residual.dtype)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of sums over x, and of the waist."""
        return torch.float64 if self.x.dtype is torch.float64 else torch.float32
