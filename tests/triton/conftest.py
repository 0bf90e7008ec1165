"""The kernels run as compiled PTX for sm_80 and sm_90, executed on the CPU; on a GPU those marked gpu run as they are.

Every test runs in another schedule of programs and warps, and fails where the executor finds a race, an access out of
bounds, a read of what nobody wrote, or a wait that is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

from bench.ptx import Executor, executing

ARCHITECTURES = ("sm_90", "sm_80")


@pytest.fixture(autouse=True, params=ARCHITECTURES)
def executor(request: pytest.FixtureRequest, _one_thread_and_no_unwritten_memory: None) -> Iterator[Executor | None]:
    """What executes the kernels of the test; None on a GPU."""
    torch.use_deterministic_algorithms(False)  # sum by atomics, the default
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available() or request.param != ARCHITECTURES[0]:
            pytest.skip("needs a GPU, whose architecture is its own")
        yield None
        return
    with executing(request.param, seed=crc32(request.node.name.encode())) as executor:
        yield executor
    assert not executor.errors, "\n".join(dict.fromkeys(map(str, executor.errors)))
