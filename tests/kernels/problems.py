"""Small shapes and problems for the operators' tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
        return random_problem(operator, (TINY_DOWN,), lead, dtype, **options)
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
        problem.index,
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


def groupings(count: int) -> Iterator[tuple[torch.Tensor, int]]:
    """So many random indices, and how many adapters are stacked: every kind of group in turn."""
    for case in range(count):
        generator = torch.Generator().manual_seed(case)
        adapters = int(torch.randint(1, 9, (), generator=generator))
        rows = int(torch.randint(1, 40, (), generator=generator))
        kind = case % 5
        if kind == 0:  # one row each, some adapters without any
            index = torch.randperm(adapters, generator=generator)[: 1 + adapters // 2]
        elif kind == 1:  # one adapter for all
            index = torch.full((rows,), adapters - 1)
        elif kind == 2:  # one large group among small ones
            index = torch.cat([torch.arange(adapters), torch.zeros(rows, dtype=torch.int64)])
        else:
            index = torch.randint(-1 if kind == 3 else 0, adapters, (rows,), generator=generator)
        yield index[torch.randperm(len(index), generator=generator)], adapters


def one_at_a_time(problem: Problem) -> Answers:
    """The answers of stacked adapters by a call for each of them, with its rows alone."""
    rows, tensors = ("x", "residual"), problem.tensors
    base = problem.x if isinstance(problem.residual, str) else problem.residual
    none = problem.index == -1
    answers = {f"d{name}": torch.zeros_like(t) for name, t in tensors.items()} | {"y": torch.zeros_like(problem.dy)}
    if base is not None:
        answers["y"][none] = base[none]
        answers["dx" if isinstance(problem.residual, str) else "dresidual"][none] = problem.dy[none]
    for a in sorted(set(problem.index.flatten().tolist()) - {-1}):
        mine = problem.index == a
        own = {name: t[mine] if name in rows else t[a] for name, t in tensors.items()}
        one = replace(problem.with_tensors(own), dy=problem.dy[mine], index=None)
        for name, answer in one.solve().items():
            answers[name][mine if name in ("y", "dx", "dresidual") else a] = answer
    return answers


def assert_as_one_at_a_time(problem: Problem, relative: float) -> None:
    """y within 1e-6, and every gradient within this relative error, of those by a call for each adapter."""
    ours, alone = problem.solve(), one_at_a_time(problem)
    assert error(ours["y"], alone["y"]) <= 1e-6
    if (dscale := ours.pop("dscale", None)) is not None:  # of each adapter one sum, whose terms may cancel
        base = problem.x if isinstance(problem.residual, str) else 0 if problem.residual is None else problem.residual
        terms = ((alone["y"].double() - base) * problem.dy.double()).abs().sum()
        assert (dscale - alone.pop("dscale")).abs().max() <= relative * terms
    assert_equal(ours, alone, relative)
