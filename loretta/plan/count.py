"""Counts a training step of a model of any size: on some of its blocks where all are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from loretta.plan.fakes import fake_tensors
from loretta.plan.step import StepBytes, blocks_of, run_step

SAMPLED_BLOCKS = (2, 3, 4)  # two points and a check; a single block would be the first and the last one at once
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
        self._alike = self._layers > max(SAMPLED_BLOCKS) and len({repr(block) for block in blocks}) == 1

    def count(self, batch: Batch) -> StepBytes:
        """The bytes of a step.

        Raises:
            ValueError: the model's forward depends on values, which fake tensors do not have.
        """
        if self._alike:
            few, more, most = SAMPLED_BLOCKS
            first, second = self._count(batch, few), self._count(batch, more)
            if not self._checked:
                self._alike = first.at(few, second, more, most) == self._count(batch, most)
                self._checked = True
            if self._alike:
                return first.at(few, second, more, self._layers)
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
