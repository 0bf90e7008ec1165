"""The one place that decides which implementation serves a call."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from loretta_kernels._autocast import is_on, off

BACKENDS = ("auto", "c", "torch", "triton")
ENVIRONMENT_VARIABLE = "LORETTA_BACKEND"
_CANNOT = 'backend "{}" was asked for, but cannot serve: {}'
_IN_C = frozenset((torch.float32, torch.bfloat16))
_HAS_TRITON = find_spec("triton") is not None


class _Choice(threading.local):
    """The backend asked for: one per thread, and an instance attribute, which torch.compile guards on."""

    def __init__(self) -> None:
        self.name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


_choice = _Choice()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve the calls made inside, on this thread, with one backend; their backward follows them.

    Autograd's own threads (the recomputation of a checkpoint on CUDA) see the environment's choice: to force a backend
    for a whole training run, set `LORETTA_BACKEND`.

    Args:
        name: "auto", "c", "torch" or "triton". Auto is the Triton kernels for tensors on a GPU (CUDA or ROCm), the C
            path for fp32 and bf16 on the CPU, and PyTorch for everything else: fp64, fp16 on the CPU, and where triton
            or a C compiler is not installed. A forced backend that cannot serve a call makes it raise `RuntimeError`
            with the reason; it never falls back.

    Raises:
        ValueError: another name.
    """
    previous, _choice.name = _choice.name, _checked(name, "backend()")
    try:
        yield
    finally:
        _choice.name = previous


def choose(x: torch.Tensor, *others: torch.Tensor | None) -> str:
    """The backend, "c", "torch" or "triton", that serves a call with these tensors; x is where it runs."""
    name = _checked(_choice.name, ENVIRONMENT_VARIABLE)
    best = _best_on(x) if name == "auto" else name
    if best == "torch":
        return best
    dtypes = [t.dtype for t in (x, *others) if t is not None]
    reason = _why_not_c(x.device, dtypes) if best == "c" else _why_not_triton(x.device, dtypes)
    if reason is None:
        return best
    if name != "auto":
        raise RuntimeError(_CANNOT.format(name, reason))
    if _serves(best, dtypes) and not torch.compiler.is_compiling():  # a warning would break the graph
        _warn_of_the_slower_path(reason, "GPU" if best == "triton" else "CPU")
    return "torch"


def run(operator: str, *args: Any) -> Any:
    """Run an operator by the backend named in its last argument, with autocast off inside."""
    *operands, name = args
    function = getattr(_implementation(name), operator)
    if not is_on(operands[0].device):
        return function(*operands)
    with off(operands[0].device):
        return function(*operands)


@cache
def _implementation(name: str) -> ModuleType:
    """The package that holds a backend's functions, imported when first used."""
    if name == "c" and (reason := _why_no_library()):  # in compiled code nobody has asked yet
        if _choice.name == "c":
            raise RuntimeError(_CANNOT.format(name, reason))
        return import_module("loretta_kernels._torch")
    return import_module(f"loretta_kernels._{name}")


def _best_on(x: torch.Tensor) -> str:
    """The fastest backend for the device of x."""
    return "triton" if x.is_cuda else "c" if x.device.type == "cpu" else "torch"


def _serves(name: str, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a backend computes with such tensors."""
    return torch.float64 not in dtypes if name == "triton" else _IN_C.issuperset(dtypes)


def _why_not_triton(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why Triton cannot serve a call with these tensors on this device, or None when it can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensors are on {device}, not on a GPU"
    return None if _serves("triton", dtypes) else "the kernels compute in fp32, and there are fp64 tensors"


def _why_not_c(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why C cannot serve a call with these tensors on this device, or None when it can."""
    if device.type != "cpu":
        return f"the tensors are on {device}, not on the CPU"
    if not _serves("c", dtypes):
        return f"it takes fp32 and bf16, and there are {', '.join(sorted({str(dtype) for dtype in dtypes}))} tensors"
    return None if torch.compiler.is_compiling() else _why_no_library()  # see _implementation


@cache
def _why_no_library() -> str | None:
    """Why there is no compiled C, or None when there is; it is compiled when first asked for."""
    return import_module("loretta_kernels._c.library").why_not()


@cache
def _warn_of_the_slower_path(reason: str, processor: str) -> None:
    """Say once that a GPU or the CPU is served by PyTorch."""
    warnings.warn(f"{reason}: PyTorch serves the tensor trains on this {processor}, which is slower", stacklevel=2)


def _checked(name: str, source: str) -> str:
    """A backend's name, or an error that says where the wrong one came from."""
    if name not in BACKENDS:
        raise ValueError(f"{source} got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name
