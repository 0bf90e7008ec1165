"""A base that bitsandbytes quantises: which weights, how many bytes, and what its 8-bit linears save for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

QUANTS = ("none", "8bit", "4bit", "4bit-double")
BLOCK, ABSMAX_BLOCK = 64, 256  # weights that share a scale, and scales that share one under double quantisation
_MARK = "_planned_quant"


def quantise(base: Any, quant: str) -> None:
    """Mark the weights that transformers gives to bitsandbytes: every linear but the head, which stays as it is.

    Their shape and dtype do not change, which a step needs; 8-bit linears save their input for backward, as
    bitsandbytes does.
    """
    if quant == "none":
        return
    excluded = get_keys_to_not_convert(base)
    for name, module in base.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, excluded):
            setattr(module.weight, _MARK, quant)
            if quant == "8bit":
                module.forward = _SavingInput(module)  # type: ignore[method-assign]


def quant_of(parameter: Tensor) -> str | None:
    """How the weight will be stored, where that is not its dtype."""
    return getattr(parameter, _MARK, None)


def quantised_bytes(shape: torch.Size, quant: str) -> int:
    """Bytes of a weight [out, in] and of what it is dequantised by.

    8bit: int8 and an fp32 scale a row. 4bit (NF4): two weights a byte, an fp32 scale a block of 64, a table of 16
    fp32. 4bit-double: the scales in a byte each, with an fp32 scale a block of 256, a table of 256 and an offset.
    """
    numel = shape.numel()
    if quant == "8bit":
        return numel + 4 * shape[0]
    blocks = -(-numel // BLOCK)
    packed = (numel + 1) // 2 + 4 * 16
    if quant == "4bit":
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // ABSMAX_BLOCK) + 4 * 256 + 4


class _SavingInput:
    """The forward of a frozen linear that saves its input for backward."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.linear.weight.t() if isinstance(self.linear, Conv1D) else self.linear.weight
        return _Linear.apply(x, weight, self.linear.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, weight = ctx.saved_tensors
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None
