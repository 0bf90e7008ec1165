"""Several implementations timed side by side: every round runs each of them once, forward then backward."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

FLUSH_BYTES = 2**28
DROPPED = 2  # first rounds: caches, allocators and what is built lazily settle in them


@dataclass(frozen=True)
class Work:
    """What is timed.

    Args:
        forward: what forward does; returns what backward needs.
        backward: what backward does with it, or None.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None


class Rounds:
    """A call is one round over all `works`, in an order drawn anew.

    Each finds in the caches what the one before it left there: none may always follow the same.

    Args:
        works: what takes part, by name.
        device: where it runs.
        dropped: how many first rounds do not count, and are run now.

    Attributes:
        times: for each name its rounds, seconds of (forward, backward).
    """

    def __init__(self, works: dict[str, Work], device: torch.device, dropped: int = DROPPED) -> None:
        self.works = works
        self.times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        self._order = Random(0)
        self._run = _GPUClock(device) if device.type == "cuda" else _run_on_cpu
        self._of_a_round = 0.0
        for _ in range(dropped):
            self()
        if dropped:
            self._of_a_round = sum(sum(times[-1]) for times in self.times.values())
        self.times = {name: [] for name in works}

    def __call__(self) -> None:
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name in self._order.sample(list(self.works), len(self.works)):
                self.times[name].append(self._run(self.works[name]))
        finally:
            if collecting:
                gc.enable()

    def needed(self, seconds: float, at_least: int = 7, at_most: int = 200) -> int:
        """How many rounds fill about so many seconds, judged by the last of those dropped."""
        return max(at_least, min(at_most, int(seconds / max(self._of_a_round, 1e-6))))

    def summary(self) -> dict[str, dict[str, float]]:
        """For each name the medians in milliseconds, the spread (interquartile range over median), the rounds."""
        return {name: _summary(times) for name, times in self.times.items()}


def _summary(times: list[tuple[float, float]]) -> dict[str, float]:
    """The medians of one name."""
    both = [1000 * sum(pair) for pair in times]
    low, _, high = quantiles(both, n=4, method="inclusive") if len(both) > 1 else (both[0],) * 3
    return {
        "forward": median(1000 * forward for forward, _ in times),
        "backward": median(1000 * backward for _, backward in times),
        "both": median(both),
        "spread": (high - low) / median(both),
        "rounds": len(both),
    }


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """Two of the values, the k-th from either end, with the median of what they are drawn from between them: with a
    probability of 95 % at least, k as large as that allows; of fewer than six values the outermost."""
    n, k, below = len(values), 0, 0.5 ** len(values)
    while (next_below := below + comb(n, k + 1) * 0.5**n) <= 0.025:
        k, below = k + 1, next_below
    ordered = sorted(values)
    return ordered[k], ordered[n - 1 - k]


def _run_on_cpu(work: Work) -> tuple[float, float]:
    """Seconds of forward and backward: the process's time, which with one thread is that of the clock on the wall, but
    for what other processes take of the core."""
    start = time.process_time()
    state = work.forward()
    middle = time.process_time()
    if work.backward is not None:
        work.backward(state)
    return middle - start, time.process_time() - middle


class _GPUClock:
    """The same between events on the GPU.

    Before each work a large buffer is cleared: that empties the L2 cache, and keeps the GPU busy while the host
    launches. Under some 100 microseconds, where the host cannot keep ahead, it is the host that is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, work: Work) -> tuple[float, float]:
        with torch.cuda.device(self._device):
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            self._flush.zero_()
            start.record()
            state = work.forward()
            middle.record()
            if work.backward is not None:
                work.backward(state)
            end.record()
            end.synchronize()
        return start.elapsed_time(middle) / 1000, middle.elapsed_time(end) / 1000
