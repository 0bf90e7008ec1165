"""The operator in PyTorch: the sides contracted by small matmuls, skinny products with x, an analytic backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loretta_kernels._torch import adapter, grouped
from loretta_kernels._torch.inference import infer
from loretta_kernels.call import Call

__all__ = ["backward", "forward", "infer"]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and the waist `[N, K]`."""
    return (adapter if call.adapter is None else grouped).forward(call)


def backward(call: Call, waist: Tensor, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dx, ddown, ddown_bias, dup, dup_bias, dscale: those that `needs` names, None for the others."""
    return (adapter if call.adapter is None else grouped).backward(call, waist, dy, needs)
