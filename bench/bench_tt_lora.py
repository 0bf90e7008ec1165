"""tt_lora against its peers, forward and backward: pytest bench/bench_tt_lora.py."""

from __future__ import annotations

from bench.operators import measure

KIND = "rep"


def test_tt_lora(cell, dtype, device, seconds, benchmark, record) -> None:
    measure(cell, dtype, device, seconds, benchmark, record)
