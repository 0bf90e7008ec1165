"""One training step, run as it is to count its bytes: forward, loss, backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loretta.plan.live import LiveBytes, SavedBytes

TOP, MIDDLE, BOTTOM = 0, 1, 2  # of the backward, which comes down from the last block to the first


@dataclass(frozen=True)
class StepBytes:
    """The bytes that a step adds to the model and its optimiser's state.

    Attributes:
        saved: what autograd keeps at the end of the forward.
        top: the most that is alive at once up to the end of the last block's backward.
        bottom: the most that is alive at once from the beginning of the first block's backward.
    """

    saved: int
    top: int
    bottom: int

    @property
    def peak(self) -> int:
        return max(self.top, self.bottom)

    def at(self, layers: int, other: StepBytes, other_layers: int, wanted: int) -> StepBytes:
        """The bytes for `wanted` layers, on the line through this step of `layers` and another one."""

        def on_the_line(here: int, there: int) -> int:
            return here + (there - here) * (wanted - layers) // (other_layers - layers)

        return StepBytes(
            on_the_line(self.saved, other.saved),
            on_the_line(self.top, other.top),
            on_the_line(self.bottom, other.bottom),
        )


def run_step(model: nn.Module, inputs: dict[str, Tensor], grad_share: float = 1.0) -> StepBytes:
    """Run forward and backward on `inputs`, as the Trainer does, and count.

    Args:
        model: in training mode, without gradients; its tensors and the inputs real, or all fake and of the mode that is
            on. Its gradients are there afterwards.
        inputs: what the model is called with, labels among them.
        grad_share: the part of a finished gradient that stays on the device (1 / GPUs where gradients are sharded).
    """
    own = [*model.parameters(), *model.buffers()]
    saved, live = SavedBytes(own), LiveBytes([*own, *inputs.values()], grad_share)
    with _watched(model, live), live:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            loss = model(**inputs).loss
        saved_bytes = saved.total()
        loss.backward()
    peaks = [live.peaks.get(phase, 0.0) for phase in (TOP, MIDDLE, BOTTOM)]
    if BOTTOM not in live.peaks:  # too few blocks to tell the phases apart
        peaks = [max(peaks)] * 3
    return StepBytes(saved_bytes, int(peaks[TOP]), int(peaks[BOTTOM]))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks: the longest list of modules that holds most of the parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(
        lists, key=lambda found: (sum(p.numel() for p in found.parameters()), len(found)), default=nn.ModuleList()
    )


@contextmanager
def _watched(model: nn.Module, live: LiveBytes) -> Iterator[None]:
    """Tell `live` of finished gradients, and where the backward is in the blocks."""
    blocks = blocks_of(model)
    handles = [
        parameter.register_post_accumulate_grad_hook(live.gradient_is_complete)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]

    def begin_at(block: nn.Module, phase: int) -> Any:
        def before_forward(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(live, "phase", phase))

        return block.register_forward_pre_hook(before_forward, with_kwargs=True)

    if len(blocks) > 1:
        handles += [begin_at(blocks[-1], MIDDLE), begin_at(blocks[1], BOTTOM)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
