"""What the launchers make of their operands."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from loretta_kernels._dispatch import PTX_VARIABLE
from loretta_kernels._triton.plan import MULTIPROCESSORS, Blocks, Plan

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
DEFAULT_ARCHITECTURE = os.environ.get(PTX_VARIABLE) or "sm_90"


def rows_of(x: Tensor, features: int) -> Tensor:
    """x as `[N, features]` whose features lie side by side: a view where it can be one."""
    rows = x.reshape(-1, features)
    return rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()


def contiguous(vector: Tensor | None) -> Tensor | None:
    """The vector with its elements side by side."""
    return None if vector is None else vector.contiguous()


def grads_like(tensors: Sequence[Tensor | None], needs: Sequence[bool], N: int) -> tuple[Any, ...]:
    """Memory for the gradients that are needed, zero where there are no rows; None for the others."""
    new = torch.empty_like if N else torch.zeros_like
    return tuple(
        new(t, memory_format=torch.contiguous_format) if t is not None and need else None
        for t, need in zip(tensors, needs, strict=True)
    )


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """A dtype as the kernels know it."""
    return _DTYPES[dtype]


def block_constants(plan: Plan, blocks: Blocks, x_dtype: torch.dtype, y_dtype: torch.dtype) -> dict[str, object]:
    """Block sizes, and the dtype and precision of the products with rows: fp32 unless x and y share 16 bits."""
    dtype = x_dtype if x_dtype is y_dtype else torch.float32
    exact = dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "BLOCK_N": blocks.n,
        "BLOCK_C": blocks.c,
        "DTYPE": triton_dtype(dtype),
        "PRECISION": plan.precision(exact),
    }


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
