"""Every test runs on the CPU, offline, on one thread, and sees an element that nobody wrote as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

INTERPRET = "TRITON_INTERPRET"


def _define_kernels_for_the_interpreter() -> None:
    """Import triton and the kernels as the interpreter's, before anything else imports triton for a GPU.

    The tests do not see the variable, but for those of the kernels.
    """
    previous, os.environ[INTERPRET] = os.environ.get(INTERPRET), "1"
    try:
        import loretta_kernels._triton.planned  # noqa: F401
    finally:
        if previous is None:
            del os.environ[INTERPRET]


if find_spec("triton") and not torch.cuda.is_available():
    _define_kernels_for_the_interpreter()


@pytest.fixture(autouse=True)
def _one_thread_and_no_unwritten_memory() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
