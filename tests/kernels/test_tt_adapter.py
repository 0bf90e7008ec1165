"""tt_adapter: y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loretta_kernels import ACTIVATIONS, TTShape, reference, tt_adapter

from .problems import (
    DTYPES,
    TINY_DOWN,
    TINY_UP,
    adapter_problem,
    assert_as_good_as_plain,
    assert_equal,
    solve,
)

pytestmark = pytest.mark.usefixtures("cpu_path")

SQUARE = [
    pytest.param(TTShape.for_matrix(768, 64, 5), TTShape.for_matrix(64, 768, 5), (2, 9), id="paper-rank-five"),
    pytest.param(TTShape.for_matrix(23, 5, 2), TTShape.for_matrix(5, 23, 2), (13,), id="prime-sizes"),
    pytest.param(TTShape.for_matrix(64, 1, 3), TTShape.for_matrix(1, 64, 3), (20,), id="bottleneck-of-one"),
    pytest.param(TTShape.for_matrix(64, 16, 3), TTShape.for_matrix(16, 64, 3), (1,), id="one-row"),
    pytest.param(TTShape.for_matrix(512, 8, 2), TTShape.for_matrix(8, 512, 2), (600,), id="rows-beyond-one-block"),
]


@pytest.mark.parametrize("residual", ["x", "another", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("down", "up", "lead"), SQUARE)
def test_output_and_every_gradient_are_as_good_as_plain_pytorch(down, up, lead, dtype, activation, residual):
    problem = adapter_problem(down, up, lead, dtype, residual=residual, activation=activation)
    ours, plain = solve(tt_adapter, problem), solve(reference.tt_adapter, problem)
    # Through a bottleneck of one everything depends on single numbers, whose summands may cancel.
    chains = 4 if down.out_features == 1 else 1
    assert_as_good_as_plain(ours, plain, solve(reference.tt_adapter, problem.to(torch.float64)), chains)
    assert ours["y"].dtype is ours["dx"].dtype is dtype
    assert ours["ddown"].dtype is ours["dup_bias"].dtype is problem.tensors["down"].dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["another", "none"])
def test_adapts_from_one_width_to_another(dtype, residual):
    down, up = TTShape.for_matrix(96, 16, 3), TTShape.for_matrix(16, 200, 4)
    problem = adapter_problem(down, up, (3, 7), dtype, residual=residual, activation="silu")
    ours, plain = solve(tt_adapter, problem), solve(reference.tt_adapter, problem)
    assert_as_good_as_plain(ours, plain, solve(reference.tt_adapter, problem.to(torch.float64)))


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_takes_parameters_in_the_dtype_of_x(biases):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (40,), torch.bfloat16, residual="none", biases=biases)
    problem = problem.to(torch.bfloat16)
    ours, plain = solve(tt_adapter, problem), solve(reference.tt_adapter, problem)
    assert_as_good_as_plain(ours, plain, solve(reference.tt_adapter, problem.to(torch.float64)))
    assert {answer.dtype for answer in ours.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
    ids=["residual-wider", "x-wider", "neither-holds-the-other"],
)
def test_a_residual_of_another_dtype_loses_nothing(x_dtype, residual_dtype):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (30,), x_dtype, residual="another")
    problem.tensors["residual"] = problem.tensors["residual"].to(residual_dtype)
    ours, truth = solve(tt_adapter, problem), solve(reference.tt_adapter, problem.to(torch.float64))
    assert ours["y"].dtype is torch.float32
    assert (ours["dx"].dtype, ours["dresidual"].dtype) == (x_dtype, residual_dtype)
    assert_equal({"y": ours["y"]}, {"y": truth["y"]}, 10 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("size", [(), (1,)], ids=["scalar", "one-element-vector"])
def test_a_scale_that_is_learnt_gets_its_gradient(value, size):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (6,), torch.float64, residual="another")
    problem.tensors["scale"] = torch.full(size, value, dtype=torch.float64)
    ours = solve(tt_adapter, problem)
    assert ours["dscale"].shape == size
    assert_equal(ours, solve(reference.tt_adapter, problem), 1e-12)


def test_a_scale_that_is_a_number_is_the_same_number():
    problem = adapter_problem(TINY_DOWN, TINY_UP, (6,), torch.float64, residual="another")
    learnt = solve(tt_adapter, problem)
    fixed = solve(lambda scale, **rest: tt_adapter(scale=0.7, **rest), problem)
    assert learnt.pop("dscale")
    problem.tensors["scale"] = torch.tensor(0.7, dtype=torch.float64)
    assert_equal(fixed, {name: a for name, a in solve(tt_adapter, problem).items() if name != "dscale"}, 1e-15)


def test_residual_is_x_means_the_same_as_a_copy_of_x():
    problem = adapter_problem(TTShape.for_matrix(12, 4, 2), TTShape.for_matrix(4, 12, 2), (7,), torch.float64)
    same = solve(tt_adapter, problem)
    problem.tensors["residual"] = problem.tensors["x"].clone()
    del problem.options["residual"]
    copied = solve(tt_adapter, problem)
    copied["dx"] = copied["dx"] + copied.pop("dresidual")
    assert_equal(same, copied, 1e-14)


modes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
ranks = st.lists(st.integers(1, 4), min_size=5, max_size=5)


@given(modes, modes, modes, ranks, ranks, st.integers(0, 9), st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_equals_the_definition_for_any_trains(i, b, o, down_ranks, up_ranks, rows, activation, biases, residual):
    problem = adapter_problem(
        TTShape(i, b, down_ranks[: len(i + b) - 1]),
        TTShape(b[::-1], o, up_ranks[: len(b + o) - 1]),
        (rows,),
        torch.float64,
        residual="another" if residual else "none",
        biases=biases,
        activation=activation,
    )
    assert_equal(solve(tt_adapter, problem), solve(reference.tt_adapter, problem), 1e-11)


GOOD = adapter_problem(TINY_DOWN, TINY_UP, (6,), torch.float32, residual="another")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.randn(6, 11)}, ValueError, r"x must be \[\.\.\., 12\] for TTShape.*got \[6, 11\]"),
        ({"x": torch.ones(6, 12, dtype=torch.int32)}, TypeError, "x must have a floating-point dtype"),
        ({"down": torch.randn(5)}, ValueError, r"down must be \[\d+\], got \[5\]"),
        ({"up": torch.randn(5)}, ValueError, r"up must be \[\d+\], got \[5\]"),
        ({"down_bias": torch.randn(5)}, ValueError, r"down_bias must be \[4\], got \[5\]"),
        ({"up_bias": torch.randn(1)}, ValueError, r"up_bias must be \[15\], got \[1\]"),
        ({"down_shape": None}, TypeError, "shape of down must be a TTShape, got NoneType"),
        (
            {"down_shape": TTShape((3, 4), (2, 2, 2), 2), "down": torch.randn(42), "down_bias": None},
            ValueError,
            "first train gives 8 features, the second takes 4",
        ),
        ({"activation": "swish"}, ValueError, "relu, gelu, gelu_tanh, silu, tanh, identity, got 'swish'"),
        ({"residual": torch.randn(6, 12)}, ValueError, r"residual must be \[6, 15\].*got \[6, 12\]"),
        ({"residual": torch.randn(15)}, ValueError, r"residual must be \[6, 15\].*got \[15\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"scale": torch.ones(2)}, ValueError, r"one-element tensor, got \[2\]"),
        ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"one-element int64.*int64 \[2\]"),
        ({"dropout_p": 0.5, "seed": torch.zeros(1)}, ValueError, r"one-element int64 tensor, got torch.float32"),
    ],
)
def test_names_what_is_wrong(changes, kind, message):
    with pytest.raises(kind, match=message):
        tt_adapter(**GOOD.tensors | GOOD.options | changes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_a_number_stays_in_its_row(dtype, activation):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (40,), dtype, residual="none", activation=activation)
    problem.tensors["x"][7, 3] = torch.nan
    answers = solve(tt_adapter, problem)
    for name in ("y", "dx"):
        rows = answers[name].isnan().all(1)
        assert rows.nonzero().tolist() == [[7]] or (name == "dx" and not rows.any())
        assert answers[name][torch.arange(40) != 7].isfinite().all()
    assert answers["ddown"].isnan().any()
