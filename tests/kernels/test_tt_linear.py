"""tt_linear: y = x · W + b."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loretta_kernels import TTShape, reference, tt_linear, tt_matrix

from .problems import DTYPES, assert_as_good_as_plain, assert_equal, linear_problem, random_cores, solve

pytestmark = pytest.mark.usefixtures("cpu_path")

CASES = [
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
    pytest.param(TTShape((4, 3), (2, 5), 2), (), id="no-leading-dimension"),
    pytest.param(TTShape((4, 3), (2, 5), 2), (1,), id="single-row"),
    pytest.param(TTShape.for_matrix(768, 8, 2), (400,), id="rows-beyond-one-block"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("shape", "lead"), CASES)
def test_output_and_every_gradient_are_as_good_as_plain_pytorch(shape, lead, bias, dtype):
    problem = linear_problem(shape, lead, dtype, bias)
    ours, plain = solve(tt_linear, problem), solve(reference.tt_linear, problem)
    assert_as_good_as_plain(ours, plain, solve(reference.tt_linear, problem.to(torch.float64)))
    assert ours["y"].dtype is ours["dx"].dtype is dtype
    assert ours["dcores"].dtype is problem.tensors["cores"].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_takes_cores_in_the_dtype_of_x(dtype):
    problem = linear_problem(TTShape.for_matrix(768, 64, 5), (20,), dtype).to(dtype)
    ours, plain = solve(tt_linear, problem), solve(reference.tt_linear, problem)
    assert_as_good_as_plain(ours, plain, solve(reference.tt_linear, problem.to(torch.float64)))
    assert {answer.dtype for answer in ours.values()} == {dtype}


modes = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@given(st.data(), modes, modes, st.lists(st.integers(0, 4), max_size=2), st.booleans())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_equals_the_definition_for_any_modes_ranks_and_rows(data, in_modes, out_modes, lead, bias):
    bonds = len(in_modes) + len(out_modes) - 1
    ranks = data.draw(st.lists(st.integers(1, 5), min_size=bonds, max_size=bonds))
    problem = linear_problem(TTShape(in_modes, out_modes, ranks), lead, torch.float64, bias)
    assert_equal(solve(tt_linear, problem), solve(reference.tt_linear, problem), 1e-12)


def test_cores_may_be_a_slice_of_a_larger_tensor():
    shape = TTShape((4, 3), (2, 5), 2)
    whole, x = torch.randn(2 * shape.num_params + 7), torch.randn(9, 12)
    for cores in (whole[7 : 7 + shape.num_params], whole[: 2 * shape.num_params : 2]):
        assert torch.equal(tt_linear(x, cores, shape), tt_linear(x, cores.clone(), shape))


@pytest.mark.parametrize("rows", [1, 20], ids=["few-rows", "many-rows"])
def test_the_bits_do_not_depend_on_what_requires_grad(rows):
    problem = linear_problem(TTShape.for_matrix(768, 64, 5), (rows,), torch.float32)
    with torch.no_grad():
        y = tt_linear(**problem.tensors, **problem.options)
    assert torch.equal(solve(tt_linear, problem)["y"], y)


def test_tt_matrix_is_what_tt_linear_multiplies_by():
    shape = TTShape.for_matrix(64, 30, 3)
    cores = random_cores(shape, torch.float64).requires_grad_()
    x = torch.randn(5, 64, dtype=torch.float64)
    by_matrix, by_train = x @ tt_matrix(cores, shape), tt_linear(x, cores, shape)
    assert_equal({"y": by_matrix.detach()}, {"y": by_train.detach()}, 1e-12)
    (of_matrix,), (of_train,) = (torch.autograd.grad(y.cos().sum(), cores) for y in (by_matrix, by_train))
    assert_equal({"dcores": of_matrix}, {"dcores": of_train}, 1e-12)


def test_tt_matrix_keeps_the_dtype_of_the_cores_and_sums_in_fp32():
    shape = TTShape.for_matrix(64, 30, 3)
    cores = random_cores(shape).bfloat16()
    exact = reference.tt_matrix(cores.double(), shape)
    assert torch.equal(tt_matrix(cores, shape), exact.float().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = tt_matrix(cores.float(), shape)
    assert torch.equal(under_autocast, tt_matrix(cores.float(), shape))


SHAPE = TTShape((4, 3), (2, 5), 2)
GOOD = linear_problem(SHAPE, (6,), torch.float32)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.randn(6, 11)}, ValueError, r"x must be \[\.\.\., 12\] for TTShape.*got \[6, 11\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"got \[\]"),
        (
            {"x": torch.zeros(6, 12, dtype=torch.int64)},
            TypeError,
            "x must have a floating-point dtype, got torch.int64",
        ),
        ({"cores": torch.randn(39)}, ValueError, r"cores must be \[38\], got \[39\]"),
        ({"cores": torch.randn(2, 19)}, ValueError, r"cores must be \[38\], got \[2, 19\]"),
        ({"cores": torch.zeros(38, dtype=torch.int32)}, TypeError, "cores must have a floating-point dtype"),
        ({"bias": torch.randn(12)}, ValueError, r"bias must be \[10\], got \[12\]"),
        ({"shape": (4, 3, 2, 5)}, TypeError, "shape of cores must be a TTShape, got tuple"),
    ],
)
def test_names_what_is_wrong(changes, kind, message):
    with pytest.raises(kind, match=message):
        tt_linear(**GOOD.tensors | GOOD.options | changes)


def test_bf16_is_rounded_to_nearest_and_ties_to_even():
    shape = TTShape((2,), (1,), 1)
    x = torch.tensor([[1, 2**-8], [1 + 2**-7, 2**-8], [1, 2**-7], [1, 2**-9], [1 + 2**-7, -(2**-8)]])
    y = tt_linear(x.bfloat16(), torch.ones(shape.num_params), shape)
    assert torch.equal(y, x.sum(1, keepdim=True).bfloat16())
    assert y.flatten().tolist() == [1, 1 + 2**-6, 1 + 2**-7, 1, 1]


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001])
def test_bf16_keeps_what_is_not_a_number(bits):
    shape = TTShape((2,), (3,), 1)
    cores = torch.full((shape.num_params,), bits, dtype=torch.int32).view(torch.float32)
    assert tt_linear(torch.ones(2, 2, dtype=torch.bfloat16), cores, shape).isnan().all()
