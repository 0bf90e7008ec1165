"""The space of problems that is searched: any modes, ranks, rows and dtypes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import prod

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from loretta_kernels import TTShape

LARGEST = 200  # features: several blocks, and still quick
CASES = int(os.environ.get("LORETTA_TEST_CASES", 320))


def search(share: float) -> Callable[..., object]:
    """The settings of a test that takes this share of all cases."""
    return settings(
        derandomize=True,
        max_examples=round(CASES * share),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def train(i: Sequence[int], o: Sequence[int], ranks: Sequence[int]) -> TTShape:
    """The train of these modes, with as many of the ranks as it has bonds."""
    return TTShape(i, o, ranks[: len(i) + len(o) - 1])


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
modes = st.lists(st.integers(1, 7), min_size=1, max_size=4).filter(lambda modes: prod(modes) <= LARGEST)
bottlenecks = modes.filter(lambda modes: prod(modes) <= 64)
ranks = st.lists(st.integers(1, 6), min_size=7, max_size=7)
rows = st.one_of(st.integers(1, 20), st.sampled_from([67, 131]))
