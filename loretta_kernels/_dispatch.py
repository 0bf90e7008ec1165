"""The one place that decides which implementation serves a call."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from loretta_kernels._autocast import is_on, off
from loretta_kernels.call import Call

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "LORETTA_BACKEND"
PTX_VARIABLE = "LORETTA_PTX"  # an architecture, sm_80 or sm_90: its PTX is executed for tensors on the CPU
OLDEST_TRITON = (3, 6)


class _Choice(threading.local):
    """The backend asked for: one per thread."""

    def __init__(self) -> None:
        self.name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


_choice = _Choice()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve the calls made inside, on this thread, with one backend; their backward follows them.

    Code compiled by `torch.compile` or exported holds no backend: whoever runs it chooses. So the backward of compiled
    code, and what a checkpoint computes again on one of autograd's own threads (on CUDA), see the choice of that
    thread: to force a backend for a whole training run, set `LORETTA_BACKEND`.

    Args:
        name: "auto", "torch" or "triton". Auto is the Triton kernels for tensors on a GPU (CUDA or ROCm), and PyTorch
            for everything else: CPUs, fp64, and where triton is not installed or too old. A forced backend that cannot
            serve a call makes it raise `RuntimeError` with the reason; it never falls back.

    Raises:
        ValueError: another name.

    Example:
        >>> shape = TTShape.for_matrix(768, 768, rank=5)
        >>> train = TT(torch.randn(shape.num_params), shape)
        >>> with backend("torch"):
        ...     y = tt_linear(torch.randn(4, 768), train)
    """
    previous, _choice.name = _choice.name, _checked(name, "backend()")
    try:
        yield
    finally:
        _choice.name = previous


def forced() -> str:
    """The backend that this thread asks for; "auto" where it asks for none."""
    return _checked(_choice.name, ENVIRONMENT_VARIABLE)


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the waist, by the backend that serves the call, with autocast off inside."""
    if not is_on(call.x.device):
        return _serving(call).forward(call)
    with off(call.x.device):
        return _serving(call).forward(call)


def infer(call: Call) -> torch.Tensor:
    """y alone, for a call without gradients; as `forward`."""
    serving = _serving(call)
    if serving is _implementation("torch") and not is_on(call.x.device):
        y: torch.Tensor | None = serving.infer(call)
        if y is not None:
            return y
    return forward(call)[0]


def backward(
    call: Call, waist: torch.Tensor, dy: torch.Tensor, needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the call's differentiable operands that are needed, None for the others; as `forward`."""
    if not is_on(call.x.device):
        return _serving(call).backward(call, waist, dy, needs)
    with off(call.x.device):
        return _serving(call).backward(call, waist, dy, needs)


def _serving(call: Call) -> ModuleType:
    """The package of the backend that serves a call."""
    name = forced()
    if name == "torch" or (name == "auto" and not call.x.is_cuda):
        return _implementation("torch")
    reason = why_not_triton(call)
    if reason is None:
        return _implementation("triton")
    if name == "triton":
        raise RuntimeError(f'backend "triton" was asked for, but cannot serve: {reason}')
    if why_no_triton() is not None:
        _warn_of_the_slower_path(reason)
    return _implementation("torch")


@cache
def _implementation(name: str) -> ModuleType:
    """The module that holds a backend's functions, imported when first used."""
    return import_module({"torch": "loretta_kernels._torch", "triton": "loretta_kernels._triton.adapter"}[name])


def why_not_triton(call: Call) -> str | None:
    """Why Triton cannot serve a call, or None when it can."""
    if (reason := why_no_triton()) is not None:
        return reason
    device = call.x.device
    if device.type != "cuda" and not (device.type == "cpu" and _runs_on_cpu()):
        return f"the tensors are on {device}, not on a GPU"
    if any(t is not None and t.dtype is torch.float64 for t in call.tensors):
        return "the kernels compute in fp32, and there are fp64 tensors"
    return None


def _runs_on_cpu() -> bool:
    """Whether the kernels are executed on the CPU, to test them: interpreted, or as PTX."""
    return os.environ.get("TRITON_INTERPRET") == "1" or bool(os.environ.get(PTX_VARIABLE))


@cache
def why_no_triton() -> str | None:
    """Why the installed Triton cannot be used, or None when it can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is too old for the kernels, which need {oldest} or later"
    return None


@cache
def _warn_of_the_slower_path(reason: str) -> None:
    """Warn once that PyTorch serves a GPU."""
    warnings.warn(f"{reason}: PyTorch serves the tensor trains on this GPU, which is slower", stacklevel=2)


def _checked(name: str, source: str) -> str:
    """A backend's name, or an error that names the source of a wrong one."""
    if name not in BACKENDS:
        raise ValueError(f"{source} got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name
