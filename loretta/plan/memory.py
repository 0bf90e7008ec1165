"""Bytes on each device: exact for what lasts from step to step, estimated for the highest moment within one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loretta.plan.quantised import quant_of, quantised_bytes
from loretta.plan.step import StepBytes, blocks_of


@dataclass(frozen=True)
class Devices:
    """GPUs that share a run: with `fsdp` they share what lasts (the fullest is counted), else each holds all of it."""

    gpus: int = 1
    fsdp: bool = False

    @property
    def shards(self) -> int:
        return self.gpus if self.fsdp else 1

    def part(self, tensor: Tensor) -> int:
        """Elements of the tensor on the fullest device: FSDP2 cuts the first dimension into chunks."""
        if tensor.dim() == 0 or self.shards == 1:
            return tensor.numel()
        return -(-tensor.shape[0] // self.shards) * tensor.shape[1:].numel()


@dataclass(frozen=True)
class Memory:
    """Bytes on a device (`trainable`: parameters that are trained, over all devices).

    Attributes:
        weights: parameters and buffers, exact.
        gradients, optimiser: of what is trained; AdamW's two moments and its step counters, exact.
        activations: what autograd saves for backward, exact.
        peak: the highest moment of a step, all of the above and what operators need in passing: an estimate.
    """

    trainable: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    peak: int


def memory(model: nn.Module, step: StepBytes, devices: Devices) -> Memory:
    """Add up a model, its AdamW and a step.

    Args:
        model: as it is trained, adapters included; on the meta device or real.
        step: of one device's batch.

    The estimate of the peak adds to the step: the largest dequantised weight; without FSDP, DDP's buckets, as large as
    the gradients; with it, two gathered blocks (one in use, one ahead) and what is in no block. Or the update, if that
    is higher: `foreach` AdamW makes one temporary of each gradient's size.
    """

    def stored(tensor: Tensor, elements: int) -> int:
        if quant := quant_of(tensor):
            return -(-quantised_bytes(tensor.shape, quant) * elements // tensor.numel())
        return elements * tensor.itemsize

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(stored(parameter, devices.part(parameter)) for parameter in model.parameters())
    weights += sum(buffer.nbytes for buffer in model.buffers())
    gradients = sum(devices.part(parameter) * parameter.itemsize for parameter in trained)
    optimiser = 2 * gradients + torch.float32.itemsize * len(trained)

    passing = max((p.numel() * p.itemsize for p in model.parameters() if quant_of(p)), default=0)
    buckets = 0
    if devices.shards > 1:
        blocks = [sum(stored(p, p.numel()) for p in block.parameters()) for block in blocks_of(model)]
        everything = sum(stored(p, p.numel()) for p in model.parameters())
        passing += 2 * max(blocks, default=0) + everything - sum(blocks)
    elif devices.gpus > 1:
        buckets = gradients
    peak = weights + optimiser + buckets + max(step.peak + passing, 2 * gradients)
    return Memory(sum(p.numel() for p in trained), weights, gradients, optimiser, step.saved, peak)


def largest_batch(peak: Callable[[int], int], limit: float) -> int:
    """The most rows whose peak is within the limit; 0 if one row is too many.

    The peak is piecewise linear in the rows, each piece steeper than the last, so the line through two points is a
    lower bound beyond them and an upper bound between them.
    """
    if peak(1) > limit:
        return 0
    low, high = 1, 2
    while peak(high) <= limit:
        slope = (peak(high) - peak(low)) / (high - low)
        low, high = high, high + (int((limit - peak(high)) / slope) + 1 if slope else high)
    while high - low > 1:
        part = (limit - peak(low)) / (peak(high) - peak(low))
        guess = min(max(low + int(part * (high - low)), low + 1), high - 1)
        low, high = (guess, high) if peak(guess) <= limit else (low, guess)
    return low
