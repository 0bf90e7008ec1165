"""One launch forward and one backward, planned alike with and without tensors."""

from __future__ import annotations

from math import prod

import pytest
import torch

from loretta_kernels import TTShape, backend
from loretta_kernels.selfcheck import random_problem
from tests.kernels.problems import OPERATORS, TINY_DOWN, TINY_UP, tiny_problem

pytest.importorskip("triton")
from loretta_kernels._triton import launch
from loretta_kernels._triton.planned import planned

pytestmark = pytest.mark.parametrize("executor", ["sm_90"], indirect=True)
DOWN, UP = TTShape((3, 4), (2, 2), (2, 3, 2)), TTShape((2, 2), (4, 3), (2, 3, 2))
every_operator = pytest.mark.parametrize("operator", OPERATORS)


def shapes_of(operator):
    return (DOWN,) if operator == "tt_linear" else (DOWN, UP)


def launches_of(operator, rows):
    """The launches of forward and backward, and their answers."""
    problem = random_problem(operator, shapes_of(operator), rows, torch.float32, scale=1.0)
    with backend("triton"), launch.recorded(run=True) as launches:
        answers = problem.solve()
    return launches, answers


def names(launches):
    """The kernels' names, without what they share."""
    return [record.kernel.__name__.strip("_").removesuffix("_kernel") for record in launches]


@pytest.mark.parametrize(("operator", "rows"), [("tt_adapter", 1), *((operator, 200) for operator in OPERATORS)])
def test_one_forward_and_one_backward(operator, rows, executor):
    assert names(launches_of(operator, rows)[0]) == ["forward", "backward"]
    assert len(executor.launches) == 2


@pytest.mark.parametrize(("operator", "rows"), [("tt_linear", 1), *((operator, 70) for operator in OPERATORS)])
def test_one_more_in_the_backward_when_it_must_be_deterministic(operator, rows):
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert names(launches_of(operator, rows)[0]) == ["forward", "backward", "sum"]


@every_operator
def test_programs_add_to_the_sums_they_share_by_atomics_alone(operator, executor):
    executor.timing = True
    launches_of(operator, 200)
    moved = executor.launches[1].traffic["grads_ptr"]
    assert moved["reduced"] > 0
    assert moved["written"] == 0


@every_operator
def test_none_for_no_rows_and_gradients_of_zero(operator):
    launches, answers = launches_of(operator, 0)
    assert not launches
    assert all(not answer.any() for answer in answers.values())


@every_operator
def test_is_planned_alike_without_tensors(operator):
    real, _ = launches_of(operator, 70)
    for record, expected in zip(real, planned(operator, shapes_of(operator), torch.float32, 70), strict=True):
        assert (record.kernel, record.grid, record.options()) == (expected.kernel, expected.grid, expected.options())
        assert {**record.constants, "ACTIVATION": ""} == {**expected.constants, "ACTIVATION": ""}
        for name, value in expected.args.items():
            if isinstance(value, torch.Tensor):
                assert (record.args[name].shape, record.args[name].dtype) == (value.shape, value.dtype), name


def test_few_rows_are_shared_by_several_programs():
    shapes = TTShape.for_matrix(4096, 64, 5), TTShape.for_matrix(64, 4096, 5)
    for rows, programs in ((1, 32), (64, 32), (65, 2)):
        for record in planned("tt_adapter", shapes, torch.float32, N=rows):
            assert prod(record.grid) >= programs, (record.kernel, record.grid)


@pytest.mark.parametrize("size", [4096, 8192])
def test_nothing_of_the_size_of_a_side_is_stored_by_a_program(size):
    shapes = TTShape.for_matrix(size, 64, 5), TTShape.for_matrix(64, size, 5)
    for record in planned("tt_adapter", shapes):
        assert record.args["tables_ptr"].numel() / prod(record.grid) < 5 * size


def test_asks_for_no_gradient_that_is_not_needed():
    problem = random_problem("tt_adapter", (TINY_DOWN, TINY_UP), 9, torch.float32, residual="none")
    x = problem.x.clone().requires_grad_()
    with backend("triton"), launch.recorded(run=True) as launches:
        problem.with_tensors({"x": x}).run().sum().backward()
    needed = {name for name in launches[1].args if name.startswith("d") and launches[1].args[name] is not None}
    assert needed == {"dy_ptr", "dx_ptr", "down_ptr", "down_bias_ptr"}
    assert x.grad.isfinite().all()


def test_answers_of_a_second_call_do_not_depend_on_the_first():
    problem = tiny_problem("tt_adapter", (9,), torch.float32)
    with backend("triton"):
        first, second = (problem.run() for _ in range(2))
    assert torch.equal(first, second)
