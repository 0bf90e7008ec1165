"""tt_adapter against its peers, forward and backward: pytest bench/bench_tt_adapter.py."""

from __future__ import annotations

from bench.operators import measure

KIND = "adp"


def test_tt_adapter(cell, dtype, device, seconds, benchmark, record) -> None:
    measure(cell, dtype, device, seconds, benchmark, record)
