"""The kernels run in Triton's interpreter, on the CPU, unless there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    """Spend the time on the kernels."""
    if torch.cuda.is_available() or not find_spec("triton"):
        yield
        return
    from .quick_interpreter import quick_interpreter

    with quick_interpreter():
        yield


@pytest.fixture(autouse=True)
def _atomics_and_no_unwritten_memory(
    _one_thread_and_no_unwritten_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum by atomics, the default; what would be uninitialised memory is NaN all the same."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.use_deterministic_algorithms(False)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def nan(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: nan(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: nan(empty_like(*args, **kwargs)))
