"""What a computation allocates: bytes kept for backward, the peak, and tensors as large as a weight."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of all storages that `forward` keeps for backward, each once; those of `parameters` do not count."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return sum(size for address, size in sizes.items() if address not in known)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that `run` has allocated at once, beyond what there was before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with ThreadPoolExecutor(1) as thread:  # a new one: what it keeps to work in counts too
        profiler = thread.submit(_profile, run).result()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return _highest(event for event in events if event.get("name") == "[memory]")


def _profile(run: Callable[[], object]) -> profile:
    """The profile of all allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return profiler


def _highest(events: Iterable[dict[str, Any]]) -> int:
    """The highest sum of the bytes that the profiler's events allocate (or free, below 0), in order of time."""
    now = highest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return highest


class Allocations(TorchDispatchMode):
    """Inside: the shapes of all tensors of at least `numel` elements whose storage no argument had.

    Attributes:
        shapes: one for each.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.numel() < self.numel:
                continue
            if tensor.untyped_storage()._cdata not in given:
                self.shapes.append(tuple(tensor.shape))
        return result
