"""Small shapes and problems for the operators' tests."""

from __future__ import annotations

import torch

from loretta_kernels import TTShape
from loretta_kernels.call import Call
from loretta_kernels.selfcheck import Answers, Problem, error, random_problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATORS = ("tt_linear", "tt_adapter", "tt_lora")
TINY_DOWN, TINY_UP = TTShape((3, 4), (2, 2), (2, 3, 2)), TTShape((2, 2), (5, 3), (2, 3, 2))
# A call in a process of its own, which prints [[2.0, 2.0]].
CALL = """
import torch
from loretta_kernels import TT, TTShape, tt_linear
shape = TTShape((2,), (2,), 1)
print(tt_linear(torch.ones(1, 2), TT(torch.ones(shape.num_params), shape)).tolist())
"""


def square(size: int, bottleneck: int, rank: int) -> tuple[TTShape, TTShape]:
    """The trains of an adapter of this size."""
    return TTShape.for_matrix(size, bottleneck, rank), TTShape.for_matrix(bottleneck, size, rank)


def tiny_problem(operator: str, lead=(6,), dtype=torch.float64, **options) -> Problem:
    """A small problem; the two trains lead from 12 features to 15."""
    if operator == "tt_linear":
        return random_problem(operator, (TINY_DOWN,), lead, dtype)
    options = ({"residual": "another"} if operator == "tt_adapter" else {}) | options
    return random_problem(operator, (TINY_DOWN, TINY_UP), lead, dtype, **options)


def call_of(problem: Problem) -> Call:
    """The call of the operator that this problem makes."""
    up, learnt = problem.up, isinstance(problem.scale, torch.Tensor)
    return Call(
        problem.x,
        problem.down.cores,
        problem.down.bias,
        up.cores if up else None,
        up.bias if up else None,
        problem.scale if learnt else None,
        torch.tensor(problem.seed, device=problem.x.device) if problem.dropout_p else None,
        problem.residual if isinstance(problem.residual, torch.Tensor) else None,
        problem.down.shape,
        up.shape if up else None,
        problem.residual == "x",
        1.0 if learnt else float(problem.scale),
        problem.activation,
        problem.dropout_p,
    )


def assert_equal(ours: Answers, others: Answers, relative: float) -> None:
    """Every answer within this relative error of the other; 0 means the same bits."""
    assert ours.keys() == others.keys()
    for name, answer in ours.items():
        assert error(answer, others[name]) <= relative, f"{name}: {error(answer, others[name]):.2e}"
