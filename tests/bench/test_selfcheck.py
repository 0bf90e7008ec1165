"""bench.selfcheck and `loretta check` pass what is right, and fail on an operator that is not."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

import loretta_kernels
from bench import selfcheck
from loretta.cli import check
from loretta.cli.parser import make_parser
from loretta_kernels.selfcheck import Row
from tests.bench.processes import run_python

right = loretta_kernels.tt_linear


def slightly_wrong(x, train):
    """A bias that is off by a thousandth, and so its gradient."""
    return right(x, replace(train, bias=train.bias * 1.001))


@pytest.fixture
def loretta_check() -> argparse.Namespace:
    return make_parser().parse_args(["check", "--cpu", "--json"])


def test_passes_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "0 above the bar" in out
    assert all(name in out for name in ("adp 4096x64x5", "rep 768→2304 8 5", "cls 768 5", "float16", "bfloat16"))


def test_covers_every_output_and_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.main(["--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    answers = {(row["operator"], row["answer"]) for row in rows if row["dtype"] == "bfloat16"}
    assert answers == {
        *(("tt_linear", name) for name in ("y", "dx", "ddown", "ddown_bias")),
        *(("tt_lora", name) for name in ("y", "dx", "ddown", "dup", "dscale", "dresidual")),
        *(("tt_adapter", name) for name in ("y", "dx", "ddown", "ddown_bias", "dup", "dup_bias", "dscale")),
    }


def test_fails_on_a_wrong_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loretta_kernels, "tt_linear", slightly_wrong)
    assert selfcheck.main(["--classes", "cls 768 5"]) == 1
    assert "cls 768 5, float32: ddown_bias is off by 1.0e-03" in capsys.readouterr().out


def test_not_a_number_is_a_miss() -> None:
    assert Row("cls 768 5", "tt_linear", 37, "float32", "y", float("nan"), 1e-6).missed
    assert not Row("cls 768 5", "tt_linear", 37, "float32", "y", 1e-7, 1e-6).missed


@pytest.mark.slow
def test_passes_the_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    ran = run_python("-m", "bench.selfcheck", "--interpret", "--classes", "cls 768 5")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 above the bar" in ran.stdout


def test_loretta_check_passes(loretta_check: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    check.run(loretta_check)
    assert json.loads(capsys.readouterr().out)["passed"]


def test_loretta_check_fails_on_a_wrong_operator(
    loretta_check: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loretta_kernels, "tt_linear", slightly_wrong)
    with pytest.raises(SystemExit) as stop:
        check.run(loretta_check)
    assert stop.value.code == 1
    assert not json.loads(capsys.readouterr().out)["passed"]
