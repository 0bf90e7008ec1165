"""Every test runs on the CPU, offline, on one thread, and sees an element that nobody wrote as NaN."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# torch remembers which functions a device context concerns when it first meets one; in torch.compile, which replaces
# some of them for a while, it would remember the wrong ones for the rest of the process (torch 2.13).
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage() -> None:
    """Every training of transformers collects garbage, which takes half a second of looking at what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_no_unwritten_memory() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
