"""On a GPU: the time of an operator against that of a device copy of the bytes that it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from loretta_kernels.selfcheck.cases import Case

ROUNDS = 50
FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved rounds, in microseconds."""

    case: str
    direction: str
    microseconds: float
    copy: float

    @property
    def ratio(self) -> float:
        """How many times the copy's time."""
        return self.microseconds / self.copy

    @property
    def text(self) -> str:
        """On one line."""
        return f"{self.case}, {self.direction}: {self.ratio:.2f} times the time of a copy"


def time_against_copy(case: Case, N: int, dtype: torch.dtype, device: torch.device) -> tuple[Timing, Timing]:
    """Forward and backward of one case, all gradients but that of a residual that is not x (it is dy itself)."""
    problem = case.problem(N, dtype).to(device)
    leaves = [t.requires_grad_() for name, t in problem.tensors.items() if name != "residual"]
    y = problem.run()
    calls: dict[str, Callable[[], object]] = {
        "forward": problem.run,
        "backward": lambda: torch.autograd.grad(y, leaves, problem.dy, retain_graph=True),
    }
    for direction, size in zip(tuple(calls), case.compulsory_bytes(N, dtype.itemsize), strict=True):
        source = torch.empty(size // 2, dtype=torch.uint8, device=device)  # read once and written once
        calls[f"copy {direction}"] = partial(torch.empty_like(source).copy_, source)
    times = _interleaved(calls, device)
    forward, backward = (
        Timing(case.name, direction, times[direction], times[f"copy {direction}"])
        for direction in ("forward", "backward")
    )
    return forward, backward


def _interleaved(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The median time of each call.

    Before each, a large buffer is cleared: it empties the L2 cache, and keeps the GPU busy while the host launches.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        for call in calls.values():
            call()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                start.record()
                call()
                end.record()
                end.synchronize()
                times[name].append(1000 * start.elapsed_time(end))
    return {name: median(values) for name, values in times.items()}
