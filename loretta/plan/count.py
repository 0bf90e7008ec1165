"""Counts a training step of a model of any size: on a few of its blocks where all blocks are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from loretta.plan.fakes import fake_tensors
from loretta.plan.step import StepBytes, blocks_of, run_step

FEW = (2, 3, 4)  # blocks: two points and a check; with one block, the first one's backward would be the last one's
CHECKPOINTING = ("none", "reentrant", "non-reentrant")


@dataclass(frozen=True)
class Batch:
    """One device's batch of a step: `rows` of `seq` tokens without padding, and labels for every token or row."""

    rows: int
    seq: int
    task: str = "causal_lm"

    def inputs(self) -> dict[str, Tensor]:
        """Token ids and labels, all zero."""
        ids = torch.zeros(self.rows, self.seq, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids.clone() if self.task == "causal_lm" else ids[:, 0].clone()}


class StepCounter:
    """Counts steps of one model on fake tensors.

    Args:
        make: the model on the meta device, adapters included, with all of its blocks (None) or the first few.
        checkpointing: one of `CHECKPOINTING`.
        grad_share, as_on_gpu: as in `run_step` and `fake_tensors`.

    Attributes:
        model: the model with all of its blocks.
    """

    def __init__(
        self,
        make: Callable[[int | None], nn.Module],
        checkpointing: str = "none",
        grad_share: float = 1.0,
        as_on_gpu: bool = True,
    ) -> None:
        self.model = make(None)
        self._make, self._checkpointing = make, checkpointing
        self._grad_share, self._as_on_gpu = grad_share, as_on_gpu
        blocks = blocks_of(self.model)
        self._layers, self._checked = len(blocks), False
        self._alike = self._layers > max(FEW) and len({repr(block) for block in blocks}) == 1

    def count(self, batch: Batch) -> StepBytes:
        """The bytes of a step.

        Raises:
            ValueError: the model's forward depends on values, which fake tensors do not have.
        """
        if self._alike:
            first, second = (self._count(batch, layers) for layers in FEW[:2])
            if not self._checked:
                self._alike = first.at(FEW[0], second, FEW[1], FEW[2]) == self._count(batch, FEW[2])
                self._checked = True
            if self._alike:
                return first.at(FEW[0], second, FEW[1], self._layers)
        return self._count(batch, None)

    def _count(self, batch: Batch, layers: int | None) -> StepBytes:
        model = self._make(layers).train()
        checkpoint(model, self._checkpointing)
        with fake_tensors(model, self._as_on_gpu):
            try:
                return run_step(model, batch.inputs(), self._grad_share)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ValueError(f"its forward depends on values ({error.func}), so no step can be counted") from error


def checkpoint(model: Any, kind: str) -> None:
    """Turn on gradient checkpointing of the kind, as the Trainer does."""
    if kind != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
