"""Rows that use different adapters of a stack: each gets what its adapter alone would give it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loretta_kernels import TT, Groups, TTShape, frozen, groups, reference, tt_adapter, tt_linear, tt_lora
from loretta_kernels.operator import _arguments
from loretta_kernels.selfcheck import check, exact_problem, random_problem

from .problems import (
    DTYPES,
    OPERATORS,
    TINY_DOWN,
    TINY_UP,
    assert_as_one_at_a_time,
    assert_equal,
    call_of,
    groupings,
    square,
    tiny_problem,
)
from .test_operators import Compiled, gradcheck

every_operator = pytest.mark.parametrize("operator", OPERATORS)
INDEX = torch.tensor([2, -1, 0, 2, 2, 0, -1])  # of four adapters; the second and the last have no rows


def grouped(operator, index=INDEX, adapters=4, dtype=torch.float64, lead=None, **options):
    """A small problem of rows with different adapters."""
    lead = tuple(index.shape) if lead is None else lead
    return tiny_problem(operator, lead, dtype, index=index, adapters=adapters, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shapes", "lead", "index"),
    [
        pytest.param(square(768, 64, 5), (9,), torch.tensor([3, 0, 3, -1, 0, 1, 3, 3, 0]), id="paper-rank-five"),
        pytest.param(square(23, 5, 2), (4, 3), torch.tensor([1, 0, -1, 1]), id="an-adapter-for-a-sequence"),
        pytest.param(square(64, 16, 3), (3, 2, 2), torch.tensor([[1, 0], [0, 0], [-1, 3]]), id="two-dimensions"),
        pytest.param(square(64, 1, 3), (5,), torch.tensor(2), id="one-adapter-for-everything"),
        pytest.param(square(512, 8, 2), (900,), torch.arange(900) % 3, id="groups-beyond-a-block"),
        pytest.param(square(96, 8, 2), (300,), torch.arange(300) % 4, id="several-groups-in-a-block"),
        pytest.param(
            (TTShape((8, 8), (8,), 2, (2, 1)), TTShape((8,), (8, 8), 2, (-1, 3))),
            (2,),
            torch.tensor([3, 3]),
            id="gains",
        ),
    ],
)
@every_operator
def test_any_shape(operator, shapes, lead, index, dtype):
    shapes = shapes[:1] if operator == "tt_linear" else shapes
    options = {"index": index, "adapters": 4, "activation": "relu"}
    check(random_problem(operator, shapes, lead, dtype, **options))
    if dtype is not torch.float64:
        check(exact_problem(operator, shapes, lead, dtype, **options))


@pytest.mark.parametrize("residual", ["x", "another", "none"])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_every_option(residual, activation, dropout_p, biases):
    options = {"residual": residual, "activation": activation, "dropout_p": dropout_p, "biases": biases}
    problem = random_problem("tt_adapter", square(24, 6, 2), 7, torch.float32, index=INDEX, adapters=4, **options)
    check(problem)
    check(replace(problem, scale=2.0))


@every_operator
def test_rows_get_what_their_adapter_alone_gives_them(operator):
    shapes = square(96, 12, 3)[: 1 if operator == "tt_linear" else 2]
    for index, adapters in groupings(200):
        options = {"index": index, "adapters": adapters}
        check(exact_problem(operator, shapes, len(index), torch.float32, **options))
        # Where an adapter has one row, a gradient's few terms may cancel: some roundings more than the answer's own.
        assert_as_one_at_a_time(random_problem(operator, shapes, len(index), torch.float32, **options), 2e-6)


def test_a_row_s_dropout_does_not_depend_on_its_group():
    x = torch.ones(7, 150, requires_grad=True)
    trains = TT(torch.ones(4, 151), TTShape((150,), (1,), 1)), TT(torch.ones(4, 2), TTShape((1,), (1,), 1))
    tt_lora(x, *trains, dropout_p=0.4, seed=5, index=INDEX).sum().backward()
    alone = torch.ones(7, 150, requires_grad=True)
    tt_lora(alone, *(TT(t.cores[0], t.shape) for t in trains), dropout_p=0.4, seed=5).sum().backward()
    used = INDEX >= 0
    assert torch.equal(x.grad[used] > 0, alone.grad[used] > 0)
    assert not x.grad[~used].any()


def test_a_scale_for_all_adapters_gets_the_sum_of_their_gradients():
    problem = grouped("tt_adapter")
    each = replace(problem, scale=torch.full((4,), 0.3, dtype=torch.float64)).solve()
    one = replace(problem, scale=torch.tensor(0.3, dtype=torch.float64)).solve()
    torch.testing.assert_close(one["dscale"], each["dscale"].sum())


@every_operator
def test_the_bits_do_not_depend_on_who_sorts(operator):
    problem = grouped(operator, dtype=torch.float32)
    first = problem.solve()
    for index in (Groups.of(INDEX, 4), Groups.of(INDEX.int(), 4), INDEX.int()):
        assert_equal(replace(problem, index=index).solve(), first, 0)


def test_sorts_once_for_all_layers(monkeypatch):
    problem, sorts = grouped("tt_linear"), []
    original = groups.Sorted.__init__

    def counted(self, *args):
        sorts.append(args)
        original(self, *args)

    monkeypatch.setattr(groups.Sorted, "__init__", counted)
    index = Groups.of(INDEX, 4)
    for _ in range(3):
        replace(problem, index=index).solve()
    assert len(sorts) == 1


def test_an_index_that_was_written_to_is_sorted_again():
    problem = grouped("tt_linear", index=INDEX.clone())
    problem.run()
    problem.index.numpy()[:] = [0, 0, 1, 1, 3, 3, 3]  # unseen by version counters
    check(problem)


def test_parameters_that_were_written_to_are_contracted_again():
    problem = grouped("tt_adapter")
    for change in (lambda t: t.data.mul_(2), lambda t: t.numpy().fill(0.1)):
        for parameter in (problem.up.cores, problem.down.cores, problem.up.bias, problem.scale):
            problem.run()
            change(parameter)
            torch.testing.assert_close(problem.run(), problem.run(reference))


def test_frozen_stacks_are_contracted_once_for_each_choice_of_adapters():
    problem = grouped("tt_adapter")
    other = replace(problem, index=torch.where(INDEX == 2, 3, INDEX))
    with torch.no_grad(), frozen():
        first = problem.run()
        torch.testing.assert_close(other.run(), other.run(reference))
        problem.run()
        problem.up.cores.data.zero_()  # against the promise
        assert torch.equal(problem.run(), first)


def test_what_another_adapter_makes_of_a_row_is_never_computed():
    problem = grouped("tt_adapter", dtype=torch.float32)
    clean = problem.solve()
    for tensor in (problem.down.cores, problem.up.cores, problem.down.bias, problem.up.bias, problem.scale):
        tensor[[1, 3]] = torch.nan  # adapters without rows
    problem.x[INDEX == 0] = torch.inf
    answers, others = problem.solve(), INDEX != 0
    for name in ("y", "dx"):
        assert torch.equal(answers[name][others], clean[name][others])
    assert torch.equal(answers["ddown"][2], clean["ddown"][2])


@every_operator
def test_gradcheck(operator):
    gradcheck(grouped(operator, torch.tensor([1, -1, 1]), 2))


@every_operator
def test_no_rows(operator):
    for lead, index in (((0,), INDEX[:0]), ((7, 0), INDEX), ((7,), torch.full((7,), -1))):
        answers = grouped(operator, index, lead=lead).solve()
        assert not answers["ddown"].any()
        assert answers["y"].shape[: len(lead)] == lead


@pytest.mark.parametrize("whole", [True, False], ids=["everything", "least"])
@every_operator
def test_opcheck(operator, whole):
    options = {}
    if operator != "tt_linear":
        options = {"residual": "another" if whole else "none", "dropout_p": 0.25 if whole else 0.0}
    problem = grouped(operator, lead=(7, 2), dtype=torch.float32, **options)
    call, ops = call_of(problem), torch.ops.loretta
    torch.library.opcheck(ops.adapter_forward.default, _arguments(call))
    needs = [t is not None and (whole or t is not call.x) for t in call.differentiable]
    arguments = _arguments(call._replace(residual=None))
    torch.library.opcheck(ops.adapter_backward.default, (torch.randn(14, 3), problem.dy, *arguments, needs))


@pytest.mark.parametrize("sort", [lambda index: index, lambda index: Groups.of(index, 4)], ids=["tensor", "groups"])
@every_operator
def test_compiles_whole_forward_and_backward(operator, sort):
    options = {} if operator == "tt_linear" else {"dropout_p": 0.3}
    problem = grouped(operator, dtype=torch.float32, lead=(7, 2), **options)
    problem = replace(problem, index=sort(problem.index))
    assert_equal(problem.solve(Compiled()), problem.solve(), 0)


def test_exports_with_any_index():
    class Linear(torch.nn.Module):
        def forward(self, x, train, index):
            return tt_linear(x, train, index=index)

    problem = grouped("tt_linear", dtype=torch.float32)
    for index in (INDEX, Groups.of(INDEX, 4)):
        exported = torch.export.export(Linear(), (problem.x, problem.down, index)).module()
        other = INDEX.flip(0)
        given = other if isinstance(index, torch.Tensor) else Groups.of(other, 4)
        assert torch.equal(exported(problem.x, problem.down, given), replace(problem, index=other).run())


def test_torch_func_and_vmap_see_the_definition():
    problem = grouped("tt_linear")

    def loss(cores, x, index):
        return tt_linear(x, TT(cores, problem.down.shape), index=index).square().sum()

    cores = problem.down.cores.clone().requires_grad_()
    loss(cores, problem.x, INDEX).backward()
    torch.testing.assert_close(torch.func.grad(loss)(problem.down.cores, problem.x, INDEX), cores.grad)
    by_row = torch.func.vmap(lambda x, i: tt_linear(x, problem.down, index=i))(problem.x, INDEX)
    torch.testing.assert_close(by_row, problem.run())


CORES, ROWS = torch.zeros(4, TINY_DOWN.num_params), torch.zeros(7, 12)


@pytest.mark.parametrize(
    ("error_type", "message", "call"),
    [
        (TypeError, "index must be Groups, or a tensor of int64 or int32, got torch.float32", {"index": INDEX.float()}),
        (TypeError, "index must be Groups, or a tensor of int64 or int32, got torch.bool", {"index": INDEX > 0}),
        (TypeError, "index must be Groups, or a tensor of int64 or int32, got list", {"index": [0] * 7}),
        (ValueError, "index must have the first of x's leading dimensions [7], got [6]", {"index": INDEX[:6]}),
        (ValueError, "index must have the first of x's leading dimensions [7], got [7, 1]", {"index": INDEX[:, None]}),
        (ValueError, "index must be from -1, no adapter, to 3, the last in the stack, got values from -1 to 4",
         {"index": INDEX + 2 * (INDEX == 2)}),
        (ValueError, "got values from -2 to 1", {"index": INDEX.clamp(max=0) * 2 + (INDEX == 2)}),
        (ValueError, "index groups 5 adapters, but 4 are stacked", {"index": Groups.of(INDEX, 5)}),
        (ValueError, "with an index, train must be a TT with cores [adapters, num_params], got [", {"cores": CORES[0]}),
        (ValueError, "the cores of train must be [4,", {"cores": CORES[:, 1:]}),
        (ValueError, "the bias of train must be [4,", {"bias": torch.zeros(TINY_DOWN.out_features)}),
        (ValueError, "the cores of train must be [", {"index": None}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(error_type, message, call):
    arguments = {"cores": CORES, "bias": None, "index": INDEX} | call
    with pytest.raises(error_type) as raised:
        tt_linear(ROWS, TT(arguments["cores"], TINY_DOWN, arguments["bias"]), index=arguments["index"])
    assert message in str(raised.value)


def test_groups_are_checked_where_they_are_made():
    with pytest.raises(ValueError, match="got values from -1 to 2"):
        Groups.of(INDEX, 2)
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        Groups.of(INDEX.float(), 4)


def test_both_trains_are_stacks_of_the_same_adapters():
    down, up = TT(CORES, TINY_DOWN), TT(torch.zeros(3, TINY_UP.num_params), TINY_UP)
    with pytest.raises(ValueError, match=r"the cores of up must be \[4, "):
        tt_adapter(ROWS, down, up, index=INDEX)
    up = TT(torch.zeros(4, TINY_UP.num_params), TINY_UP)
    with pytest.raises(ValueError, match=r"a one-element tensor, or \[4\], one for each adapter, got \[3\]"):
        tt_adapter(ROWS, down, up, index=INDEX, scale=torch.ones(3))
