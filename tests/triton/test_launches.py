"""One launch forward and one backward, planned alike with and without tensors."""

from __future__ import annotations

from math import prod

import pytest
import torch

from bench.counting import counting
from loretta_kernels import TTShape, backend, tt_adapter, tt_linear, tt_lora
from tests.kernels.problems import TINY_DOWN, TINY_UP, adapter_problem, linear_problem, lora_problem, solve

pytest.importorskip("triton")
from loretta_kernels._triton import launch, plan
from loretta_kernels._triton.planned import planned

DOWN, UP = TTShape((3, 4), (2, 2), (2, 3, 2)), TTShape((2, 2), (4, 3), (2, 3, 2))


def problem_of(function, rows):
    """A small problem, with the residual and the biases that the layers use."""
    if function is tt_linear:
        return linear_problem(DOWN, (rows,), torch.float32)
    if function is tt_adapter:
        return adapter_problem(DOWN, UP, (rows,), torch.float32)
    return lora_problem(DOWN, UP, (rows,), torch.float32)


def launches_of(function, rows):
    """The launches of forward and backward, and their answers."""
    with backend("triton"), launch.recorded(run=True) as launches:
        answers = solve(function, problem_of(function, rows))
    return launches, answers


every_function = pytest.mark.parametrize("function", [tt_linear, tt_adapter, tt_lora])


def names(launches):
    """The kernels' names, without what they share."""
    return [record.kernel.__name__.split("_")[3] for record in launches]


@every_function
@pytest.mark.parametrize("rows", [1, 70, 200])
def test_one_forward_and_one_backward(function, rows):
    assert names(launches_of(function, rows)[0]) == ["fwd", "bwd"]


@every_function
@pytest.mark.parametrize("rows", [1, 70])
def test_one_more_in_the_backward_when_it_must_be_deterministic(function, rows):
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert names(launches_of(function, rows)[0]) == ["fwd", "bwd", "sum"]


@every_function
def test_when_it_must_be_deterministic_every_program_adds_to_a_buffer_of_its_own(function):
    """One after the other they could share one: that they race for it would show on a GPU only."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    backward = launches_of(function, 200)[0][1]
    sums = backward.args["grads_ptr"].view(backward.grid[0], -1)
    assert len(sums) > 1
    assert sums.any(1).all()


@every_function
def test_programs_add_to_the_sums_they_share_by_atomics_alone(function):
    """One after the other they could load and store: that what others add is lost would show on a GPU only."""
    with backend("triton"), counting() as counters:
        solve(function, problem_of(function, 200))
    moved = counters[1].bytes
    assert moved["atomic", "grads_ptr"] > 0
    assert ("store", "grads_ptr") not in moved


def test_few_rows_are_shared_by_several_programs(monkeypatch):
    monkeypatch.setattr(plan, "MAX_PARTS", 64)  # the tests that run the kernels have fewer
    down, up = TTShape.for_matrix(4096, 64, 5), TTShape.for_matrix(64, 4096, 5)
    for rows, programs in ((1, 32), (64, 32), (65, 2)):
        for record in planned("tt_adapter", (down, up), N=rows):
            assert prod(record.grid) >= programs, (record.kernel, record.grid)
        assert (record.constants["PARTS"] > 1) == (rows <= 64)


@every_function
def test_none_for_no_rows_and_gradients_of_zero(function):
    launches, answers = launches_of(function, 0)
    assert not launches
    assert all(not answer.any() for answer in answers.values())


@every_function
def test_is_planned_alike_without_tensors(function):
    real, _ = launches_of(function, 70)
    shapes = (DOWN,) if function is tt_linear else (DOWN, UP)
    for record, expected in zip(real, planned(function.__name__, shapes, torch.float32, 70), strict=True):
        assert (record.kernel, record.grid, record.options()) == (expected.kernel, expected.grid, expected.options())
        assert record.constants == expected.constants
        pointers = {name for name, value in expected.args.items() if isinstance(value, torch.Tensor)}
        for name in pointers:
            assert record.args[name].shape == expected.args[name].shape, name
            assert record.args[name].dtype == expected.args[name].dtype, name


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (TTShape.for_matrix(4096, 64, 5), TTShape.for_matrix(64, 4096, 5)),
        (TTShape.for_matrix(8192, 64, 5), TTShape.for_matrix(64, 8192, 5)),
    ],
    ids=["4096", "8192"],
)
def test_nothing_of_the_size_of_a_side_is_stored_by_a_program(down, up):
    for record in planned("tt_adapter", (down, up)):
        assert record.args["tables_ptr"].numel() / prod(record.grid) < 5 * down.in_features
        assert record.args["tables_ptr"].dtype is torch.float32


def test_asks_for_no_gradient_that_is_not_needed():
    problem = adapter_problem(TINY_DOWN, TINY_UP, (9,), torch.float32, residual="none")
    x, leaves = problem.tensors["x"].requires_grad_(), {k: t for k, t in problem.tensors.items() if k != "x"}
    with backend("triton"), launch.recorded(run=True) as launches:
        tt_adapter(x=x, **leaves, **problem.options).sum().backward()
    needed = {name for name in launches[1].args if name.startswith("d") and launches[1].args[name] is not None}
    assert needed == {"dy_ptr", "dx_ptr", "down_ptr", "down_bias_ptr"}
    assert x.grad.isfinite().all()
