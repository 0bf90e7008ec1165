"""The one place that decides which implementation serves a call."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from loretta_kernels._autocast import off

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "LORETTA_BACKEND"
_CANNOT = 'backend "triton" was asked for, but cannot serve: {}'
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
        name: "auto", "torch" or "triton". Auto is the Triton kernels for tensors on a GPU (CUDA or ROCm), PyTorch for
            those on the CPU, for fp64, and where triton is not installed. A forced backend that cannot serve a call
            makes it raise `RuntimeError` with the reason; it never falls back.

    Raises:
        ValueError: another name.
    """
    previous, _choice.name = _choice.name, _checked(name, "backend()")
    try:
        yield
    finally:
        _choice.name = previous


def choose(x: torch.Tensor, *others: torch.Tensor | None) -> str:
    """The backend, "torch" or "triton", that serves a call with these tensors; x is where it runs."""
    name = _checked(_choice.name, ENVIRONMENT_VARIABLE)
    if name == "torch" or (name == "auto" and not x.is_cuda):
        return "torch"
    reason = _why_not_triton(x.device)
    if any(t is not None and t.dtype is torch.float64 for t in (x, *others)):
        reason = reason or "the kernels compute in fp32, and there are fp64 tensors"
    elif reason and name == "auto" and not torch.compiler.is_compiling():  # a warning would break the graph
        _warn_of_the_slower_path(reason)
    if reason and name == "triton":
        raise RuntimeError(_CANNOT.format(reason))
    return "torch" if reason else "triton"


def run(operator: str, *args: Any) -> Any:
    """Run an operator by the backend named in its last argument, with autocast off inside."""
    *operands, name = args
    with off(operands[0].device):
        return getattr(_implementation(name), operator)(*operands)


@cache
def _implementation(name: str) -> ModuleType:
    """The package that holds a backend's functions, imported when first used."""
    return import_module(f"loretta_kernels._{name}")


def _why_not_triton(device: torch.device) -> str | None:
    """Why Triton cannot serve a call on this device, or None when it can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device}, not on a GPU"


@cache
def _warn_of_the_slower_path(reason: str) -> None:
    """Say once that a GPU is served by PyTorch."""
    warnings.warn(f"{reason}: PyTorch serves the tensor trains on this GPU, which is slower", stacklevel=2)


def _checked(name: str, source: str) -> str:
    """A backend's name, or an error that says where the wrong one came from."""
    if name not in BACKENDS:
        raise ValueError(f"{source} got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name
