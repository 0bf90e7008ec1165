"""python -m bench.ptx fails on what is wrong, and LORETTA_PTX lets the kernels serve CPU tensors."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bench.ptx import Executor, executing
from bench.ptx import __main__ as command
from bench.ptx.phases import phases_of
from loretta_kernels import backend, tt_linear
from loretta_kernels.selfcheck import linear_case, random_problem
from tests.kernels.problems import TINY_DOWN
from tests.ptx import kernels

SMALL = ["--arch", "sm_90", "--rows", "5", "--schedules", "2", "--json"]
CALL = """
import torch
from loretta_kernels import TT, TTShape, tt_linear
train = TT(torch.ones(3).requires_grad_(), TTShape((2,), (1,), 1))
y = tt_linear(torch.ones(1, 2), train)
y.sum().backward()
print(y.tolist(), train.cores.grad.shape)
"""


@pytest.fixture(autouse=True)
def _one_small_class(monkeypatch):
    monkeypatch.setattr(command, "chosen", lambda args: [linear_case(48, 3)])
    torch.use_deterministic_algorithms(False)


def test_a_class_passes_and_is_counted(capsys):
    assert command.main([*SMALL, "--counters"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["launches"] == 2
    assert not row["missed"]
    assert not row["errors"]
    assert 0 < row["ratio"] <= 1
    phases = [each for each in found["counters"] if "phase" in each]
    assert any(each["phase"].startswith("for block") for each in phases)
    assert sum(each["instructions"] * each["programs"] for each in phases) == pytest.approx(
        row["instructions"], rel=0.02
    )
    for each in phases:
        assert each["cycles"] > 0
        assert each["wavefronts"] >= each["ideal_wavefronts"]


def test_an_answer_above_its_bar_fails(capsys):
    def judge(case, N, dtype):
        return [dataclasses.replace(row, bar=row.error / 2) for row in command.judged(case, N, dtype)]

    assert command.main(SMALL, judge) == 1
    assert all("is off by" in what for what in json.loads(capsys.readouterr().out)["failures"])


def test_a_finding_fails(capsys, monkeypatch):
    def executing_without_barriers(arch, **options):
        return executing(arch, change=lambda ptx: ptx.replace("bar.sync 	0;", ""), **options)

    monkeypatch.setattr(command, "executing", executing_without_barriers)
    assert command.main(SMALL) == 1
    assert any("race between warps" in what for what in json.loads(capsys.readouterr().out)["failures"])


@pytest.mark.parametrize(
    ("arch", "says"), [("sm_90", "[[2.0]] torch.Size([3])"), ("sm_75", "sm_80 to sm_90, got 'sm_75'")]
)
def test_the_variable_lets_the_kernels_serve_cpu_tensors(arch, says):
    environment = os.environ | {"LORETTA_PTX": arch, "LORETTA_BACKEND": "triton"}
    ran = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False)
    assert says in ran.stdout + ran.stderr
    assert (ran.returncode == 0) == (arch == "sm_90")


def test_without_the_variable_they_do_not():
    problem = random_problem("tt_linear", (TINY_DOWN,), 3, torch.float32)
    with backend("triton"), pytest.raises(RuntimeError, match="the tensors are on cpu"):
        tt_linear(problem.x, problem.down)


def test_executing_leaves_everything_as_it_was():
    before = torch.empty, torch.Tensor.new_empty, os.environ.get("LORETTA_PTX")
    with executing("sm_80"):
        assert torch.empty(4).isnan().all()
    assert (torch.empty, torch.Tensor.new_empty, os.environ.get("LORETTA_PTX")) == before


def test_refuses_an_architecture_whose_instructions_it_does_not_know():
    with pytest.raises(ValueError, match="sm_80 to sm_90, got 'sm_100'"):
        Executor("sm_100")


def test_phases_are_loops_calls_and_what_lies_between():
    phase_of = phases_of(kernels.product)
    start = kernels.product.fn.__code__.co_firstlineno
    source = "kernels.py"
    lines = {phase_of(f"tiles.py:3:1 @[ {source}:{line}:9 ]") for line in range(start, start + 24)} - {None}
    assert any(name.startswith("for k0:") for name in lines)
    assert any(name.startswith("from ") for name in lines)
    assert phase_of("elsewhere.py:3:1") is None
