"""bench.traffic counts what a kernel moves, and fails on one that moves too much."""

from __future__ import annotations

import json

import pytest

from tests.bench.processes import run_python

pytest.importorskip("triton")


def test_a_small_class_passes() -> None:
    ran = run_python("-m", "bench.traffic", "--classes", "cls 768 5", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    forward, backward = json.loads(ran.stdout)["rows"]
    assert forward["launches"] == backward["launches"] == 1
    row = 768 * 2
    moved = forward["by_tensor"]
    assert (moved["load x"], moved["store y"], moved["store waist"]) == (row, row, 5 * 4)
    moved = backward["by_tensor"]
    assert (moved["load x"], moved["load dy"], moved["store dx"]) == (row, row, row)
    assert 1 < forward["ratio"] < 1.6
    assert 1 < backward["ratio"] < 1.5


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
