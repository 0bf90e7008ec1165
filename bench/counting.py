"""Bytes that a kernel moves, counted in Triton's interpreter in 32-byte sectors (issue of one tile by one program).

Rows (x, the residual, y, dy, dx, the waist) count each time they are loaded. Everything else that is loaded, cores,
biases, tables and sums, counts once for each program: it stays in the L1 cache, if it fits (`resident`). Stores and
atomics count every time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from bench.launches import ROWS

SECTOR = 32


class Counter:
    """Of one launch: bytes by what was done to which tensor.

    Attributes:
        bytes: by `("load" | "store" | "atomic", argument)`.
        from_l1: bytes that loads of what is not rows issued.
    """

    def __init__(self, launch: Any) -> None:
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)
        self.from_l1 = 0
        self._seen: dict[tuple[int, ...], set[int]] = defaultdict(set)
        self._tensors = [
            (value.data_ptr(), value.data_ptr() + value.untyped_storage().nbytes(), name)
            for name, value in launch.args.items()
            if isinstance(value, Tensor)
        ]

    @property
    def resident(self) -> int:
        """Bytes of what is not rows that any one program loads: what its L1 cache is trusted to keep."""
        return min(map(len, self._seen.values()), default=0) * SECTOR

    def count(self, action: str, program: tuple[int, ...], addresses: np.ndarray, mask: np.ndarray) -> None:
        """One access by one program."""
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)]
        if not addresses.size:
            return
        name = self._owner(int(addresses.min()))
        sectors = np.unique(addresses // SECTOR)
        moved = len(sectors)
        if action == "load" and name not in ROWS:
            self.from_l1 += moved * SECTOR
            seen = self._seen[program]
            before = len(seen)
            seen.update(sectors.tolist())
            moved = len(seen) - before
        self.bytes[action, name] += moved * SECTOR

    def _owner(self, address: int) -> str:
        """The argument whose memory this is."""
        for start, end, name in self._tensors:
            if start <= address < end:
                return name
        raise RuntimeError(f"a kernel touches {address:#x}, which belongs to none of its arguments")


@contextmanager
def counting() -> Iterator[list[Counter]]:
    """A counter for each launch made inside; TRITON_INTERPRET must be set before the kernels are imported."""
    from triton.runtime.interpreter import interpreter_builder as builder

    from loretta_kernels._triton import launch as launches

    counters: list[Counter] = []
    load, store, atomic, execute = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
        launches.execute,
    )

    def counted_load(ptrs: Any, mask: Any, *others: Any) -> Any:
        counters[-1].count("load", builder.grid_idx, ptrs.data, mask.data)
        return load(ptrs, mask, *others)

    def counted_store(ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        counters[-1].count("store", builder.grid_idx, ptrs.data, mask.data)
        return store(ptrs, value, mask, *others)

    def counted_atomic(operation: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        counters[-1].count("atomic", builder.grid_idx, ptrs.data, mask.data)
        return atomic(operation, ptrs, value, mask, *others)

    def counted_execute(launch: Any) -> None:
        counters.append(Counter(launch))
        execute(launch)

    hooks = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": counted_atomic,
    }
    vars(builder).update(hooks)
    launches.execute = counted_execute
    try:
        yield counters
    finally:
        launches.execute = execute
        for name in hooks:
            delattr(builder, name)
