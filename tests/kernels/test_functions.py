"""tt_linear, tt_adapter, tt_lora and tt_matrix compute their definitions, for any shape, dtype and option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loretta_kernels import ACTIVATIONS, TT, TTShape, reference, tt_adapter, tt_linear, tt_lora, tt_matrix
from loretta_kernels.selfcheck import check, exact_problem, random_problem

from .problems import DTYPES, OPERATORS, TINY_DOWN, TINY_UP, assert_equal, square, tiny_problem

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

LINEAR = [
    pytest.param(TTShape.for_matrix(768, 64, 5), (3, 5), id="paper-rank-five-down"),
    pytest.param(TTShape.for_matrix(64, 768, 5), (16,), id="paper-rank-five-up"),
    pytest.param(TTShape.for_matrix(768, 768, 5), (4,), id="paper-classifier"),
    pytest.param(TTShape((8, 8, 12), (8, 8), (2, 3, 4, 2)), (9,), id="every-bond-its-own-rank"),
    pytest.param(TTShape((7,), (5,), 3), (11,), id="one-core-a-side"),
    pytest.param(TTShape((2, 2), (3,), (4, 9)), (10,), id="waist-wider-than-either-side"),
    pytest.param(TTShape.for_matrix(17, 23, 2), (13,), id="prime-sizes"),
    pytest.param(TTShape.for_matrix(1, 1, 2), (9,), id="one-by-one"),
    pytest.param(TTShape((2,) * 6, (2,) * 5, 3), (2, 3, 4), id="six-cores-a-side"),
    pytest.param(TTShape((4, 3), (2, 5), 1), (8,), id="rank-one"),
    pytest.param(TTShape((4, 3), (2, 5), 2, gains=(3, -2)), (8,), id="gains"),
    pytest.param(TTShape((4, 3), (2, 5), 2), (), id="no-leading-dimension"),
    pytest.param(TTShape((4, 3), (2, 5), 2), (1,), id="single-row"),
    pytest.param(TTShape.for_matrix(768, 8, 2), (400,), id="rows-beyond-one-block"),
]


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("shape", "lead"), LINEAR)
def test_tt_linear(shape, lead, bias, dtype):
    problem = random_problem("tt_linear", (shape,), lead, dtype, biases=bias)
    check(problem)
    answers = problem.solve()
    assert answers["y"].dtype is answers["dx"].dtype is dtype
    assert answers["ddown"].dtype is problem.down.cores.dtype


SQUARE = [
    pytest.param(square(768, 64, 5), (2, 9), id="paper-rank-five"),
    pytest.param(square(23, 5, 2), (13,), id="prime-sizes"),
    pytest.param(square(64, 1, 3), (20,), id="bottleneck-of-one"),
    pytest.param(square(64, 16, 3), (1,), id="one-row"),
    pytest.param(square(512, 8, 2), (600,), id="rows-beyond-one-block"),
    pytest.param((TTShape((8, 8), (8,), 2, (2, 1)), TTShape((8,), (8, 8), 2, (-1, 3))), (9,), id="gains"),
]


@every_dtype
@pytest.mark.parametrize(("shapes", "lead"), SQUARE)
def test_tt_adapter(shapes, lead, dtype):
    check(random_problem("tt_adapter", shapes, lead, dtype, activation="silu"))


@every_dtype
@pytest.mark.parametrize("residual", ["x", "another", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_residual(activation, residual, dtype):
    check(random_problem("tt_adapter", square(96, 12, 3), (2, 9), dtype, residual=residual, activation=activation))


@every_dtype
@pytest.mark.parametrize("residual", ["another", "none"])
def test_tt_adapter_from_one_width_to_another(residual, dtype):
    shapes = TTShape.for_matrix(96, 16, 3), TTShape.for_matrix(16, 200, 4)
    check(random_problem("tt_adapter", shapes, (3, 7), dtype, residual=residual, activation="silu"))


LORA = [
    pytest.param(square(768, 8, 5), (2, 9), id="paper-rank-five"),
    pytest.param((TTShape.for_matrix(768, 8, 5), TTShape.for_matrix(8, 2304, 5)), (9,), id="fused-qkv"),
    pytest.param((TTShape.for_matrix(128, 4, 3), TTShape.for_matrix(4, 31, 3)), (17,), id="narrower-prime-output"),
    pytest.param(square(60, 1, 3), (1,), id="rank-one-and-one-row"),
    pytest.param(square(512, 8, 2), (600,), id="rows-beyond-one-block"),
]


@every_dtype
@pytest.mark.parametrize("residual", ["another", "none"])
@pytest.mark.parametrize(("shapes", "lead"), LORA)
def test_tt_lora(shapes, lead, residual, dtype):
    check(random_problem("tt_lora", shapes, lead, dtype, residual=residual))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("operator", OPERATORS)
def test_whole_numbers_give_exact_answers(operator, rows, dtype):
    shapes = square(512, 16, 3)
    check(exact_problem(operator, shapes[:1] if operator == "tt_linear" else shapes, rows, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_takes_parameters_in_the_dtype_of_x(biases, dtype):
    options = {"residual": "none", "biases": biases, "param_dtype": dtype}
    problem = random_problem("tt_adapter", (TINY_DOWN, TINY_UP), (40,), dtype, **options)
    check(problem)
    assert {answer.dtype for answer in problem.solve().values()} == {dtype}


modes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
ranks = st.lists(st.integers(1, 4), min_size=5, max_size=5)
gains = st.tuples(st.integers(-3, 3), st.integers(-3, 3))


@given(modes, modes, modes, ranks, ranks, gains, gains, st.integers(0, 9), st.sampled_from(ACTIVATIONS), st.booleans(),
       st.sampled_from(["another", "none"]), st.sampled_from([0.0, 0.4]), st.sampled_from(OPERATORS))  # fmt: skip
@settings(derandomize=True, max_examples=150, deadline=None)
def test_any_trains(i, b, o, down_ranks, up_ranks, g, h, rows, activation, biases, residual, dropout_p, operator):
    down = TTShape(i, b, down_ranks[: len(i + b) - 1], g)
    up = TTShape(b[::-1], o, up_ranks[: len(b + o) - 1], h)
    options = {"biases": biases and operator != "tt_lora", "residual": residual, "activation": activation}
    if operator == "tt_linear":
        problem = random_problem(operator, (down,), rows, torch.float64, biases=biases)
    else:
        problem = random_problem(operator, (down, up), rows, torch.float64, dropout_p=dropout_p, **options)
    assert_equal(problem.solve(), problem.solve(reference), 1e-11)


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
    ids=["residual-wider", "x-wider", "neither-holds-the-other"],
)
def test_a_residual_of_another_dtype_loses_nothing(x_dtype, residual_dtype):
    problem = tiny_problem("tt_adapter", (30,), x_dtype)
    problem = problem.with_tensors({"residual": problem.residual.to(residual_dtype)})
    ours, truth = problem.solve(), problem.to(torch.float64).solve(reference)
    assert ours["y"].dtype is torch.float32
    assert (ours["dx"].dtype, ours["dresidual"].dtype) == (x_dtype, residual_dtype)
    assert_equal({"y": ours["y"]}, {"y": truth["y"]}, 10 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("size", [(), (1,)], ids=["scalar", "one-element-vector"])
@pytest.mark.parametrize("operator", ["tt_adapter", "tt_lora"])
def test_a_scale_that_is_learnt_gets_its_gradient(operator, value, size):
    problem = tiny_problem(operator, scale=torch.full(size, value, dtype=torch.float64))
    ours = problem.solve()
    assert ours["dscale"].shape == size
    assert_equal(ours, problem.solve(reference), 1e-12)


def test_a_scale_that_is_a_number_is_the_same_number():
    learnt = tiny_problem("tt_adapter", scale=torch.tensor(0.7, dtype=torch.float64)).solve()
    assert learnt.pop("dscale")
    assert_equal(tiny_problem("tt_adapter", scale=0.7).solve(), learnt, 1e-15)


def test_residual_is_x_means_the_same_as_a_copy_of_x():
    problem = random_problem("tt_adapter", square(12, 4, 2), (7,), torch.float64)
    copied = replace(problem, residual=problem.x.clone()).solve()
    copied["dx"] = copied["dx"] + copied.pop("dresidual")
    assert_equal(problem.solve(), copied, 1e-14)


def test_zero_cores_in_the_second_train_leave_the_residual_bit_for_bit():
    problem = tiny_problem("tt_lora", (50,), torch.bfloat16)
    problem = problem.with_tensors({"up": torch.zeros_like(problem.up.cores)})
    assert torch.equal(problem.solve()["y"], problem.residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_a_number_stays_in_its_row(dtype, activation):
    problem = tiny_problem("tt_adapter", (40,), dtype, residual="none", activation=activation)
    problem.x[7, 3] = torch.nan
    answers = problem.solve()
    assert answers["y"].isnan().all(1).nonzero().tolist() == [[7]]
    for name in ("y", "dx"):
        assert answers[name][torch.arange(40) != 7].isfinite().all()
    assert answers["ddown"].isnan().any()


def test_cores_may_be_a_slice_of_a_larger_tensor():
    shape = TTShape((4, 3), (2, 5), 2)
    whole, x = torch.randn(2 * shape.num_params + 7), torch.randn(9, 12)
    for cores in (whole[7 : 7 + shape.num_params], whole[: 2 * shape.num_params : 2]):
        assert torch.equal(tt_linear(x, TT(cores, shape)), tt_linear(x, TT(cores.clone(), shape)))


@pytest.mark.parametrize("rows", [1, 20, 100], ids=["one-row", "few-rows", "many-rows"])
@pytest.mark.parametrize("residual", ["x", "another", "none"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_without_gradients_the_answer_is_the_same(operator, residual, rows):
    shapes, options = square(24, 4, 2), {} if operator == "tt_linear" else {"residual": residual, "scale": 0.5}
    problem = random_problem(
        operator, shapes[:1] if operator == "tt_linear" else shapes, rows, torch.float64, **options
    )
    wanted = problem.solve()["y"]
    for _ in range(3):
        with torch.no_grad():
            assert_equal({"y": problem.run()}, {"y": wanted}, 1e-14)


def test_without_gradients_a_call_that_was_served_before_is_still_looked_at():
    x, down, up = torch.randn(3, 12), TT(torch.randn(46), TINY_DOWN), TT(torch.randn(52), TINY_UP)
    with torch.no_grad():
        for _ in range(2):
            tt_lora(x, down, up, residual=torch.randn(3, 15))
        wrong = {
            "x": {"x": torch.randn(3, 11)},
            "x of another dtype": {"x": x.double()},
            "residual": {"residual": torch.randn(3, 12)},
            "b with a bias": {"b": TT(up.cores, TINY_UP, torch.randn(15))},
            "dropout": {"dropout_p": 1.0},
            "seed": {"dropout_p": 0.5, "seed": 1.0},
        }
        for name, change in wrong.items():
            arguments = {"x": x, "a": down, "b": up, "residual": torch.randn(3, 15)} | change
            if name == "x of another dtype":
                assert tt_lora(**arguments).dtype is torch.float64
                continue
            with pytest.raises(ValueError, match=r"must (be|have)"):
                tt_lora(**arguments)


def test_tt_matrix_is_what_tt_linear_multiplies_by():
    problem = random_problem("tt_linear", (TTShape((8, 8), (6, 5), 3, (2, -3)),), (5,), torch.float64, biases=False)
    cores = problem.down.cores.requires_grad_()
    ys = problem.x @ tt_matrix(problem.down), problem.run()
    (of_matrix, of_train) = ({"y": y.detach(), "d": torch.autograd.grad(y.cos().sum(), cores)[0]} for y in ys)
    assert_equal(of_matrix, of_train, 1e-12)


def test_tt_matrix_keeps_the_dtype_of_the_cores_and_sums_in_fp32():
    shape = TTShape.for_matrix(64, 30, 3)
    cores = random_problem("tt_linear", (shape,), 1, torch.float32).down.cores.bfloat16()
    exact = reference.tt_matrix(TT(cores.double(), shape))
    assert torch.equal(tt_matrix(TT(cores, shape)), exact.float().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = tt_matrix(TT(cores.float(), shape))
    assert torch.equal(under_autocast, tt_matrix(TT(cores.float(), shape)))


def test_bf16_is_rounded_to_nearest_and_ties_to_even():
    shape = TTShape((2,), (1,), 1)
    x = torch.tensor([[1, 2**-8], [1 + 2**-7, 2**-8], [1, 2**-7], [1, 2**-9], [1 + 2**-7, -(2**-8)]])
    y = tt_linear(x.bfloat16(), TT(torch.ones(shape.num_params), shape))
    assert y.flatten().tolist() == [1, 1 + 2**-6, 1 + 2**-7, 1, 1]


X, DOWN, UP = torch.randn(6, 12), TT(torch.randn(46), TINY_DOWN), TT(torch.randn(52), TINY_UP)
WRONG = [
    ((torch.randn(6, 11), DOWN, UP), {}, ValueError, r"x must be \[\.\.\., 12\] for TTShape.*got \[6, 11\]"),
    ((torch.tensor(1.0), DOWN, UP), {}, ValueError, r"got \[\]"),
    (([1.0] * 12, DOWN, UP), {}, TypeError, "x must be a tensor, got list"),
    ((torch.ones(6, 12, dtype=torch.int32), DOWN, UP), {}, TypeError, "x must be fp64, fp32, bf16 or fp16, got"),
    ((X.to(torch.float8_e4m3fn), DOWN, UP), {}, TypeError, "x must be fp64, fp32, bf16 or fp16, got torch.float8"),
    ((X.to(torch.complex64), DOWN, UP), {}, TypeError, "x must be fp64, fp32, bf16 or fp16, got torch.complex64"),
    ((X.to_sparse(), DOWN, UP), {}, TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    ((X, DOWN.cores, UP), {}, TypeError, r"must be a TT\(cores, shape, bias=None\), got Tensor"),
    ((X, TT(torch.randn(5), TINY_DOWN), UP), {}, ValueError, r"the cores of \w+ must be \[46\], got \[5\]"),
    ((X, TT(torch.randn(2, 23), TINY_DOWN), UP), {}, ValueError, r"the cores of \w+ must be \[46\], got \[2, 23\]"),
    ((X, TT(torch.zeros(46, dtype=torch.int32), TINY_DOWN), UP), {}, TypeError, r"the cores of \w+ must be fp64"),
    ((X, DOWN, TT(torch.randn(5), TINY_UP)), {}, ValueError, r"the cores of \w+ must be \[52\], got \[5\]"),
    ((X, DOWN, TT(UP.cores, None)), {}, TypeError, r"the shape of \w+ must be a TTShape, got NoneType"),
    ((X, TT(torch.randn(38), TTShape((3, 4), (8,), 2)), UP), {}, ValueError, "8 features, the second takes 4"),
    ((X, DOWN, UP), {"residual": torch.randn(6, 12)}, ValueError, r"residual must be \[6, 15\].*got \[6, 12\]"),
    ((X, DOWN, UP), {"residual": torch.randn(15)}, ValueError, r"residual must be \[6, 15\].*got \[15\]"),
    ((X, DOWN, UP), {"residual": 0.0}, TypeError, "residual must be a tensor, got float"),
    ((X, DOWN, UP), {"dropout_p": 1.0}, ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    ((X, DOWN, UP), {"dropout_p": -0.1}, ValueError, r"dropout_p must be a number in \[0, 1\), got -0.1"),
    ((X, DOWN, UP), {"dropout_p": float("nan")}, ValueError, "dropout_p must be a number"),
    ((X, DOWN, UP), {"dropout_p": "0.5"}, ValueError, "dropout_p must be a number"),
    ((X, DOWN, UP), {"scale": torch.ones(2)}, ValueError, r"one-element tensor, got \[2\]"),
    ((X, DOWN, UP), {"scale": torch.tensor(2)}, TypeError, "scale must be fp64"),
    ((X, DOWN, UP), {"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"int64 \[2\]"),
    ((X, DOWN, UP), {"dropout_p": 0.5, "seed": torch.zeros(1)}, ValueError, "one-element int64.*torch.float32"),
    ((X, DOWN, UP), {"dropout_p": 0.5, "seed": 2**63}, ValueError, "seed must be an int of 64 bits"),
    ((X, DOWN, UP), {"dropout_p": 0.5, "seed": 1.0}, ValueError, "seed must be an int of 64 bits"),
]  # fmt: skip


@pytest.mark.parametrize("function", [tt_adapter, tt_lora])
@pytest.mark.parametrize(("args", "options", "kind", "message"), WRONG)
def test_names_what_is_wrong(function, args, options, kind, message):
    with pytest.raises(kind, match=message):
        function(*args, **options)


def test_names_what_is_wrong_in_one_function_only():
    biased = TT(DOWN.cores, TINY_DOWN, torch.randn(5))
    with pytest.raises(ValueError, match=r"the bias of train must be \[4\], got \[5\]"):
        tt_linear(X, biased)
    with pytest.raises(ValueError, match=r"the bias of down must be \[4\], got \[5\]"):
        tt_adapter(X, biased, UP)
    with pytest.raises(ValueError, match="a must have no bias in tt_lora"):
        tt_lora(X, biased, UP)
    with pytest.raises(ValueError, match="relu, gelu, gelu_tanh, silu, tanh, identity, got 'swish'"):
        tt_adapter(X, DOWN, UP, activation="swish")
    with pytest.raises(TypeError, match=r"train must be a TT\(cores, shape, bias=None\), got TTShape"):
        tt_matrix(TINY_DOWN)
