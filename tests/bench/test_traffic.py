"""bench.traffic counts what a kernel moves, and fails on one that moves too much."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.classes import FIRST_RATE
from bench.traffic import ROWS
from loretta_kernels.explain import traffic
from tests.bench.processes import run_python

pytest.importorskip("triton")
from loretta_kernels._triton.plan import adapter_plan, linear_plan

SMALL = ("cls 768 5", "rep 768→2304 8 5")


@pytest.fixture(scope="module")
def counted() -> list[dict[str, Any]]:
    """What small classes move, forward and backward."""
    ran = run_python("-m", "bench.traffic", "--classes", *SMALL, "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout)["rows"]


def test_a_small_class_passes(counted: list[dict[str, Any]]) -> None:
    forward, backward = (row for row in counted if row["case"] == "cls 768 5")
    assert forward["launches"] == backward["launches"] == 1
    row = 768 * 2
    moved = forward["by_tensor"]
    assert (moved["load x"], moved["store y"], moved["store waist"]) == (row, row, 5 * 4)
    moved = backward["by_tensor"]
    assert (moved["load x"], moved["load dy"], moved["store dx"]) == (row, row, row)
    assert 1 < forward["ratio"] < 1.6
    assert 1 < backward["ratio"] < 1.5


def test_explain_tells_what_is_counted(counted: list[dict[str, Any]]) -> None:
    for row in counted:
        (case,) = (case for case in FIRST_RATE if case.name == row["case"])
        plan = (linear_plan if len(case.shapes) == 1 else adapter_plan)(*case.shapes, 2, "sm_90")
        first, last = case.shapes[0], case.shapes[1] if len(case.shapes) == 2 else None
        told = traffic(plan, first, last, case.operator == "tt_lora", 2, ROWS)
        programs, moved, compulsory = told[row["direction"] == "backward"]
        assert programs == ROWS / 64
        assert compulsory == ROWS * row["compulsory"]
        assert moved / compulsory == pytest.approx(row["ratio"], rel=0.02), (row["case"], row["direction"])


@pytest.mark.parametrize(("reads", "code", "ratio"), [(1, 0, 1.0), (2, 0, 1.5), (3, 1, 2.0)])
def test_fails_on_a_kernel_that_reads_too_often(reads: int, code: int, ratio: float) -> None:
    ran = run_python("-m", "tests.bench.copying", str(reads))
    assert ran.returncode == code, ran.stdout + ran.stderr
    result = json.loads(ran.stdout)
    (row,) = result["rows"]
    # the bias, 64 features of fp32, counts once for each of the programs, of 16 rows each
    assert row["per_row"] == ratio * 256 + 256 / 16
    assert row["by_tensor"]["atomic sums"] == 0
    assert row["once"] == 32
    assert row["from_l1"] == reads * 256 / 16
    assert row["resident"] == 256
    assert bool(result["failures"]) == bool(code)


def test_fails_on_a_second_launch() -> None:
    ran = run_python("-m", "tests.bench.copying", "1", "twice")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert any("2 launches" in failure for failure in json.loads(ran.stdout)["failures"])
