"""Autocast: x is cast as nn.Linear casts it, nothing inside is cast again, gradients come back in their own dtypes."""

from __future__ import annotations

import pytest
import torch

from loretta_kernels import TTShape, tt_adapter, tt_linear, tt_lora

from .problems import TINY_DOWN, TINY_UP, adapter_problem, assert_equal, linear_problem, lora_problem, solve

pytestmark = pytest.mark.usefixtures("cpu_path")

DOWN, UP = TTShape.for_matrix(96, 8, 3), TTShape.for_matrix(8, 96, 3)
CASES = [
    pytest.param(tt_linear, linear_problem(DOWN, (30,), torch.float32), id="tt_linear"),
    pytest.param(tt_adapter, adapter_problem(DOWN, UP, (30,), torch.float32, residual="none"), id="tt_adapter"),
    pytest.param(tt_adapter, adapter_problem(DOWN, UP, (30,), torch.float32), id="tt_adapter-x-is-its-residual"),
    pytest.param(tt_lora, lora_problem(DOWN, UP, (30,), torch.float32, residual="none"), id="tt_lora"),
]


def under_autocast(function, dtype):
    """The function with autocast on around its forward."""

    def autocast(**arguments):
        with torch.autocast("cpu", dtype=dtype):
            return function(**arguments)

    return autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("function", "problem"), CASES)
def test_is_the_call_with_x_cast_beforehand_bit_for_bit(function, problem, dtype):
    def cast_beforehand(x, **arguments):
        cast = x.to(dtype)
        if arguments.get("residual") is x:
            arguments["residual"] = cast
        return function(x=cast, **arguments)

    ours, expected = solve(under_autocast(function, dtype), problem), solve(cast_beforehand, problem)
    assert_equal(ours, expected, 0)
    assert ours["y"].dtype is dtype
    assert {answer.dtype for name, answer in ours.items() if name != "y"} == {torch.float32}


@pytest.mark.parametrize(("function", "problem"), CASES)
def test_backward_inside_autocast_is_backward_outside(function, problem):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve(function, problem)
    assert_equal(inside, solve(under_autocast(function, torch.bfloat16), problem), 0)


def test_a_residual_that_is_not_x_keeps_its_precision():
    problem = lora_problem(TINY_DOWN, TINY_UP, (30,), torch.float32)
    problem.tensors["b"] = torch.zeros_like(problem.tensors["b"])
    y = solve(under_autocast(tt_lora, torch.bfloat16), problem)["y"]
    assert torch.equal(y, problem.tensors["residual"])


def test_leaves_fp64_alone_as_torch_does():
    problem = linear_problem(TINY_DOWN, (5,), torch.float64)
    assert_equal(solve(under_autocast(tt_linear, torch.bfloat16), problem), solve(tt_linear, problem), 0)


def test_compiles_whole_under_autocast():
    problem = adapter_problem(DOWN, UP, (6,), torch.float32)
    compiled = torch.compile(tt_adapter, fullgraph=True, backend="aot_eager")
    assert_equal(
        solve(under_autocast(compiled, torch.bfloat16), problem),
        solve(under_autocast(tt_adapter, torch.bfloat16), problem),
        0,
    )
