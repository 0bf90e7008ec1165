"""The kernels run in Triton's interpreter, on the CPU; the tests marked gpu compile them, where there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


@pytest.fixture(autouse=True)
def _where_it_belongs(request: pytest.FixtureRequest) -> None:
    """A process has the kernels either for the interpreter or for the GPU."""
    if COMPILED and request.node.get_closest_marker("gpu") is None:
        pytest.skip("through the interpreter: set TRITON_INTERPRET=1")
    if not COMPILED and request.node.get_closest_marker("gpu"):
        pytest.skip("needs a GPU, and no TRITON_INTERPRET")


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    """Spend the time on the kernels, and not on programs one after the other that would run side by side."""
    if COMPILED or not find_spec("triton"):
        yield
        return
    from loretta_kernels._triton import plan

    from .quick_interpreter import quick_interpreter

    with quick_interpreter(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MAX_PARTS", 3)
        yield


@pytest.fixture(autouse=True)
def _atomics_and_no_unwritten_memory(
    _one_thread_and_no_unwritten_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum by atomics, the default; what would be uninitialised memory is NaN all the same."""
    if not COMPILED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.use_deterministic_algorithms(False)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def nan(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: nan(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: nan(empty_like(*args, **kwargs)))
