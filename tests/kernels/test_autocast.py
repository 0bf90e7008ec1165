"""Autocast: x is cast as nn.Linear casts it, nothing inside is cast again, gradients come back in their own dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loretta_kernels
from loretta_kernels import tt_adapter
from loretta_kernels.selfcheck import random_problem

from .problems import assert_equal, square, tiny_problem

SHAPES = square(96, 8, 3)
CASES = {
    "tt_linear": random_problem("tt_linear", SHAPES[:1], 30, torch.float32),
    "tt_adapter": random_problem("tt_adapter", SHAPES, 30, torch.float32, residual="none"),
    "tt_adapter-x-is-its-residual": random_problem("tt_adapter", SHAPES, 30, torch.float32),
    "tt_lora": random_problem("tt_lora", SHAPES, 30, torch.float32, residual="none"),
}
every_case = pytest.mark.parametrize("problem", CASES.values(), ids=CASES)


class Autocast:
    """The functions with autocast on around their forward."""

    def __init__(self, dtype, functions=loretta_kernels):
        self.dtype, self.functions = dtype, functions

    def __getattr__(self, name):
        def under_autocast(*args, **kwargs):
            with torch.autocast("cpu", dtype=self.dtype):
                return getattr(self.functions, name)(*args, **kwargs)

        return under_autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_case
def test_is_the_call_with_x_cast_beforehand_bit_for_bit(problem, dtype):
    ours, expected = problem.solve(Autocast(dtype)), replace(problem, x=problem.x.to(dtype)).solve()
    assert torch.equal(ours["y"], expected["y"])
    assert ours["y"].dtype is dtype
    assert_equal(ours, expected, 0)
    assert {answer.dtype for name, answer in ours.items() if name != "y"} == {torch.float32}


@every_case
def test_backward_inside_autocast_is_backward_outside(problem):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = problem.solve()
    assert_equal(inside, problem.solve(Autocast(torch.bfloat16)), 0)


def test_a_residual_that_is_not_x_keeps_its_precision():
    problem = tiny_problem("tt_lora", (30,), torch.float32)
    problem = problem.with_tensors({"up": torch.zeros_like(problem.up.cores)})
    assert torch.equal(problem.solve(Autocast(torch.bfloat16))["y"], problem.residual)


def test_leaves_fp64_alone_as_torch_does():
    problem = tiny_problem("tt_linear")
    assert_equal(problem.solve(Autocast(torch.bfloat16)), problem.solve(), 0)


def test_compiles_whole_under_autocast():
    problem = CASES["tt_adapter-x-is-its-residual"]

    class Compiled:
        tt_adapter = staticmethod(torch.compile(tt_adapter, fullgraph=True, backend="aot_eager"))

    assert_equal(problem.solve(Autocast(torch.bfloat16, Compiled)), problem.solve(Autocast(torch.bfloat16)), 0)
