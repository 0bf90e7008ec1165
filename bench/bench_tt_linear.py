"""tt_linear against its peers, forward and backward: pytest bench/bench_tt_linear.py."""

from __future__ import annotations

from bench.operators import measure

KIND = "cls"


def test_tt_linear(cell, dtype, device, seconds, benchmark, record) -> None:
    measure(cell, dtype, device, seconds, benchmark, record)
