"""bench.tune plans with other blocks, and leaves out what spills or does not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from bench import tune
from bench.classes import FIRST_RATE
from loretta_kernels._triton import adapter
from loretta_kernels._triton.plan import Blocks, plan_of

CASE = next(case for case in FIRST_RATE if case.name == "adp 4096x64x8")  # whose backward is streamed
PLAN = plan_of(*CASE.shapes, 2, "sm_90")


@pytest.fixture
def compiles(monkeypatch):
    """A compiler by which what has eight warps spills, and three stages are too much shared memory."""
    launches = []

    def compiled(launch, arch):
        launches.append(launch)
        options = launch.options()
        spilled = 16 if options["num_warps"] == 8 else 0
        return SimpleNamespace(spilled=spilled, metadata=SimpleNamespace(shared=80_000 * options["num_stages"]))

    monkeypatch.setattr(tune, "compiled", compiled)
    monkeypatch.setattr(tune, "usage", lambda kernel: (128, kernel.spilled))
    return launches


def test_a_candidate_is_what_is_compiled(compiles):
    plans = list(tune.candidates(PLAN, "backward", [32], [64, 128], [4], [1]))
    assert plans[0] == PLAN
    assert [plan.backward for plan in plans[1:]] == [Blocks(32, 64, 4, 1), Blocks(32, 128, 4, 1)]
    found = tune.tried(CASE, "sm_90", "backward", plans[2], lambda *args: 7.0)
    assert [compiles[0].constants[name] for name in ("BLOCK_N", "BLOCK_C")] == [32, 128]
    assert (found.microseconds, found.why_not) == (7.0, "")
    assert adapter._kernels.cache_info().currsize == 0


def test_the_form_that_serves_is_the_one_that_is_varied(compiles):
    _, other = tune.candidates(PLAN, "forward", [4], [32], [4], [1])
    assert (other.one_pass.n, other.one_pass.i, other.one_pass.o) == (4, 32, 32)
    tune.tried(CASE, "sm_90", "forward", other, lambda *args: 1.0)
    assert compiles[0].constants["BLOCK_I"] == 32


def test_what_is_compiled_is_what_is_run_without_dropout(compiles):
    """With dropout, rep's default, or deterministic sums another form would serve the backward."""
    torch.use_deterministic_algorithms(False)
    case = next(case for case in FIRST_RATE if case.name == "rep 4096→4096 8 5")
    plan = plan_of(*case.shapes, 2, "sm_90")
    tune.tried(case, "sm_90", "backward", plan, lambda *args: 1.0)
    assert compiles[0].kernel.__name__ == "_one_pass_backward_kernel"


@pytest.mark.parametrize(("warps", "stages", "why"), [(8, 1, "spills"), (4, 3, "too much shared memory")])
def test_what_cannot_serve_has_no_time(warps, stages, why, compiles):
    *_, candidate = tune.candidates(PLAN, "backward", [32], [32], [warps], [stages])
    found = tune.tried(CASE, "sm_90", "backward", candidate, lambda *args: pytest.fail("it was run"))
    assert (found.microseconds, found.why_not) == (None, why)


def test_the_best_comes_first(compiles, monkeypatch, capsys):
    monkeypatch.setattr(tune, "modelled", lambda case, arch, direction, launch, _: float(launch.constants["BLOCK_N"]))
    options = ["--directions", "backward", "--n", "64", "32", "--c", "64", "--warps", "4", "8", "--stages", "1"]
    assert tune.main(["--classes", CASE.name, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "now: 8 warps, 64 rows and 64 features at a time, 3 stages" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["32.0", "64.0", "-", "-", "-"]
