"""Rows that use different adapters, in one launch forward and one backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loretta_kernels import Groups, TTShape, backend
from loretta_kernels.selfcheck import check, exact_problem, random_problem
from tests.kernels.problems import (
    OPERATORS,
    TINY_DOWN,
    assert_as_one_at_a_time,
    assert_equal,
    groupings,
    one_at_a_time,
    square,
)
from tests.kernels.test_operators import Compiled
from tests.triton.conftest import ARCHITECTURES

pytest.importorskip("triton")
from loretta_kernels._triton import adapter, launch
from loretta_kernels._triton.planned import planned

every_operator = pytest.mark.parametrize("operator", OPERATORS)
one_architecture = pytest.mark.parametrize("executor", ["sm_90"], indirect=True)
SCHEDULES = 3  # the executor draws another one for each test
every_schedule = pytest.mark.parametrize(
    "schedule",
    [*range(SCHEDULES), *(pytest.param(SCHEDULES + each, marks=pytest.mark.slow) for each in range(SCHEDULES))],
)
SHAPES = TINY_DOWN, TTShape((2, 2), (4, 3), (2, 3, 2))
INDEX = torch.tensor([2, -1, 0, 2, 2, 0, -1])


def shapes_of(operator):
    return SHAPES[:1] if operator == "tt_linear" else SHAPES


def some_groupings(schedule, arch):
    """Of 200 groupings a share for each schedule and architecture; all of them in each of the slow tests' schedules."""
    if schedule >= SCHEDULES:
        return list(groupings(200))
    return list(groupings(200))[schedule + SCHEDULES * ARCHITECTURES.index(arch) :: SCHEDULES * len(ARCHITECTURES)]


@every_schedule
@pytest.mark.parametrize(
    ("executor", "operator"),
    [*(("sm_90", operator) for operator in OPERATORS), ("sm_80", "tt_adapter")],
    indirect=["executor"],
)
def test_rows_get_what_their_adapter_alone_gives_them(operator, schedule, executor):
    for number, (index, adapters) in enumerate(some_groupings(schedule, executor.arch)):
        options = {"index": index, "adapters": adapters}
        with backend("triton"):
            check(exact_problem(operator, shapes_of(operator), len(index), torch.float32, **options), "triton")
        # the single form is compiled too, and its launches take as long again for each adapter
        if number % 10 == 0 and executor.arch == "sm_90":
            with backend("triton"):
                problem = random_problem(operator, shapes_of(operator), len(index), torch.float32, **options)
                assert_as_one_at_a_time(problem, 2e-6)


@every_schedule
@pytest.mark.parametrize(
    ("executor", "operator"),
    [("sm_90", "tt_linear"), ("sm_90", "tt_adapter"), ("sm_80", "tt_lora")],
    indirect=["executor"],
)
def test_sixteen_bits_within_the_judge(operator, schedule, executor):
    for index, adapters in some_groupings(schedule, executor.arch)[::4]:
        options = {"index": index, "adapters": adapters}
        with backend("triton"):
            check(random_problem(operator, shapes_of(operator), len(index), torch.bfloat16, **options), "triton")


def grouped(operator, rows, index, adapters, dtype=torch.float32, **options):
    shapes = square(96, 12, 3)[: 1 if operator == "tt_linear" else 2]
    return random_problem(operator, shapes, rows, dtype, index=index, adapters=adapters, **options)


@pytest.mark.parametrize("residual", ["x", "none"])
@one_architecture
def test_every_option_and_an_adapter_for_a_sequence(residual):
    options = {"residual": residual, "activation": "silu", "dropout_p": 0.3}
    with backend("triton"):
        check(grouped("tt_adapter", (7, 3), INDEX, 4, torch.bfloat16, **options), "triton")


@pytest.mark.parametrize("residual", ["another", "none"])
@one_architecture
def test_no_bias_a_scale_that_is_a_number_and_an_index_of_32_bits(residual):
    options = {"residual": residual, "activation": "silu", "dropout_p": 0.3, "biases": False, "scale": 0.5}
    with backend("triton"):
        check(grouped("tt_adapter", 7, INDEX.int(), 4, **options), "triton")


@pytest.mark.parametrize("most", [1, 2, 1024])
@one_architecture
def test_groups_of_several_blocks_and_several_programs(most, monkeypatch):
    monkeypatch.setattr(adapter, "MAX_PROGRAMS", most)
    index = torch.cat([torch.zeros(150, dtype=torch.int64), torch.tensor([2, 1, -1]), torch.full((70,), 3)])
    problem = grouped("tt_adapter", len(index), index[torch.randperm(len(index))], 4)
    with backend("triton"), launch.recorded(run=True) as launches:
        check(problem, "triton")
    forward, backward = launches[-2:]
    assert (forward.grid[0] == 5) is (most == 1)  # a program for each group, and one for the rows of none
    assert (forward.grid[0] > 6) is (most == 1024)
    assert backward.args["grads_ptr"].numel() == 4 * backward.constants["GRAD_SIZE"]


@every_operator
@one_architecture
def test_one_launch_forward_and_one_backward(operator):
    with backend("triton"), launch.recorded(run=True) as launches:
        answers = grouped(operator, 7, INDEX, 4, scale=1.0).solve()
    assert [record.kernel.__name__ for record in launches] == ["_forward_kernel", "_backward_kernel"]
    assert not answers["ddown"][[1, 3]].any()


@one_architecture
def test_deterministic_sums_are_the_same_bits_in_every_schedule(monkeypatch):
    torch.use_deterministic_algorithms(True, warn_only=True)
    problem = grouped("tt_adapter", 90, torch.arange(90) % 4 - 1, 5)
    for most in (128, 1):
        monkeypatch.setattr(adapter, "MAX_WORKSPACES", most)
        with backend("triton"), launch.recorded(run=True) as launches:
            first = problem.solve()
            assert [record.kernel.__name__ for record in launches] == [
                "_forward_kernel",
                "_backward_kernel",
                "_sum_kernel",
            ]
            for _ in range(2):
                assert_equal(problem.solve(), first, 0)
            check(problem, "triton")


@every_operator
@one_architecture
def test_rows_without_an_adapter_alone(operator):
    problem = grouped(operator, 5, torch.full((5,), -1), 3, scale=1.0)
    with backend("triton"):
        answers = problem.solve()
    base = {"tt_linear": 0, "tt_adapter": problem.x, "tt_lora": problem.residual}[operator]
    assert (answers["y"] == base).all()
    assert (answers["dx"] == (problem.dy if operator == "tt_adapter" else 0)).all()
    assert not answers["ddown"].any()


@one_architecture
def test_no_rows():
    with backend("triton"), launch.recorded() as launches:
        assert not grouped("tt_lora", 0, INDEX[:0], 3).solve()["ddown"].any()
    assert not launches


@one_architecture
def test_compiles_whole_and_groups_are_sorted_once():
    problem = replace(grouped("tt_lora", 7, INDEX, 4), index=Groups.of(INDEX, 4))
    torch.compiler.reset()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with backend("triton"):
        assert_equal(problem.solve(Compiled()), problem.solve(), 0)


@every_operator
@one_architecture
def test_is_planned_alike_without_tensors(operator):
    problem = grouped(operator, 7, torch.arange(7) % 4, 4, scale=1.0)
    with backend("triton"), launch.recorded(run=True) as launches:
        problem.solve()
    shapes = square(96, 12, 3)[: 1 if operator == "tt_linear" else 2]
    for record, expected in zip(launches, planned(operator, shapes, torch.float32, 7, adapters=4), strict=True):
        assert (record.kernel, record.grid, record.options()) == (expected.kernel, expected.grid, expected.options())
        for name, value in expected.args.items():
            if isinstance(value, torch.Tensor):
                assert (record.args[name].shape, record.args[name].dtype) == (value.shape, value.dtype), name


@pytest.mark.parametrize(("operator", "rows"), [("tt_linear", 64), ("tt_adapter", 64), ("tt_lora", 16)])
@one_architecture
def test_the_bits_of_y_are_those_of_a_call_for_each_adapter(operator, rows):
    problem = grouped(operator, 5 * rows, torch.arange(5 * rows) % 4 - 1, 3, torch.bfloat16)
    with backend("triton"):
        ours, alone = problem.solve(), one_at_a_time(problem)
    assert torch.equal(ours["y"], alone["y"])
    assert torch.equal(ours["dx"], alone["dx"])
