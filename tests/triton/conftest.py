"""The kernels run in Triton's interpreter, on the CPU, unless there is a GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"


def _define_kernels_for_the_interpreter() -> None:
    """Import the kernels as the interpreter's; the other tests of the session do not see the variable."""
    previous, os.environ[INTERPRET] = os.environ.get(INTERPRET), "1"
    try:
        import loretta_kernels._triton.planned  # noqa: F401
    finally:
        if previous is None:
            del os.environ[INTERPRET]


if find_spec("triton") and not torch.cuda.is_available():
    _define_kernels_for_the_interpreter()


@pytest.fixture(autouse=True)
def _atomics_and_no_unwritten_memory(
    _one_thread_and_no_unwritten_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum by atomics, the default; what would be uninitialised memory is NaN all the same."""
    if not torch.cuda.is_available():
        monkeypatch.setenv(INTERPRET, "1")
    torch.use_deterministic_algorithms(False)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def nan(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: nan(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: nan(empty_like(*args, **kwargs)))
