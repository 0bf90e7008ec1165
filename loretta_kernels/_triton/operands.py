"""What the launchers make of their operands."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from loretta_kernels._dispatch import PTX_VARIABLE
from loretta_kernels._triton.plan import MULTIPROCESSORS, Blocks, Plan
from loretta_kernels.call import Call
from loretta_kernels.groups import sorted_of

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
DEFAULT_ARCHITECTURE = os.environ.get(PTX_VARIABLE) or "sm_90"


def rows_of(x: Tensor, features: int) -> tuple[Tensor, int]:
    """A tensor that holds the rows of x, features side by side, and the stride between them: x itself where it can be.

    Any shape will do for the kernels, which take its address.
    """
    if x.is_contiguous():
        return x, features
    rows = x.reshape(-1, features)
    rows = rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()
    return rows, rows.stride(0)


def contiguous(vector: Tensor | None) -> Tensor | None:
    """The vector with its elements side by side."""
    return None if vector is None else vector.contiguous()


class Shares(NamedTuple):
    """Who takes which rows: in turn, or of stacked adapters the rows of one of them.

    Attributes:
        programs: that share the rows.
        groups: that are summed apart: adapters in use, or 1.
        pointers: the kernels' tables of who takes what.
        of_groups: the table of the groups, `Sorted.items`.
    """

    programs: int
    groups: int
    pointers: dict[str, Tensor | None]
    of_groups: Tensor | None


def shares_of(call: Call, plan: Plan, N: int, blocks: Blocks, most: int) -> Shares:
    """How the rows are shared by at most so many programs, and one more for each adapter."""
    if call.adapter is None:
        return Shares(plan.programs(N, blocks, most), 1, {"order_ptr": None, "items_ptr": None}, None)
    known, each, device = sorted_of(call.adapter, len(call.down)), call.rows_each, call.x.device
    items, groups = known.items(each, blocks.n * -(-N // (blocks.n * most)), device)
    return Shares(len(items), len(groups), {"order_ptr": known.rows(each, device), "items_ptr": items}, groups)


def largest_group(call: Call, N: int) -> int:
    """The most rows that one adapter has."""
    return N if call.adapter is None else sorted_of(call.adapter, len(call.down)).largest * call.rows_each


def grads_like(tensors: Sequence[Tensor | None], needs: Sequence[bool], N: int) -> tuple[Any, ...]:
    """Memory for the gradients that are needed, zero where there are no rows; None for the others."""
    new = torch.empty_like if N else torch.zeros_like
    return tuple(
        new(t, memory_format=torch.contiguous_format) if t is not None and need else None
        for t, need in zip(tensors, needs, strict=True)
    )


@contextmanager
def planning_for(arch: str) -> Iterator[None]:
    """Plan the calls made inside with tensors that are on no GPU for this architecture: sm_90, gfx942, ..."""
    global DEFAULT_ARCHITECTURE
    previous, DEFAULT_ARCHITECTURE = DEFAULT_ARCHITECTURE, arch
    try:
        yield
    finally:
        DEFAULT_ARCHITECTURE = previous


def architecture(device: torch.device) -> str:
    """The architecture that a plan is for: the device's, where there is a GPU."""
    return _architecture(device.index) if device.type == "cuda" else DEFAULT_ARCHITECTURE


def multiprocessors(device: torch.device) -> int:
    """How many the device has; an H100's where it is no GPU."""
    return _multiprocessors(device.index) if device.type == "cuda" else MULTIPROCESSORS


@cache
def _multiprocessors(index: int | None) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _architecture(index: int | None) -> str:
    """The name of a GPU's architecture."""
    properties = torch.cuda.get_device_properties(index)
    name = getattr(properties, "gcnArchName", "").split(":")[0]
    return name if torch.version.hip else f"sm_{properties.major}{properties.minor}"
