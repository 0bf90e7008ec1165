"""The CPU has two paths, C and PyTorch: a module that uses `cpu_path` runs in both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loretta_kernels import backend


@pytest.fixture(params=["auto", "torch"])
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """C for fp32 and bf16, and PyTorch for everything."""
    with backend(request.param):
        yield request.param
