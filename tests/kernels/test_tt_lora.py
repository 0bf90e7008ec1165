"""tt_lora: y = residual + scale · drop(x) · A · B."""

from __future__ import annotations

import pytest
import torch

from loretta_kernels import TTShape, reference, tt_lora

from .problems import DTYPES, TINY_DOWN, TINY_UP, assert_as_good_as_plain, assert_equal, lora_problem, solve

pytestmark = pytest.mark.usefixtures("cpu_path")

CASES = [
    pytest.param(TTShape.for_matrix(768, 8, 5), TTShape.for_matrix(8, 768, 5), (2, 9), id="paper-rank-five"),
    pytest.param(TTShape.for_matrix(768, 8, 5), TTShape.for_matrix(8, 2304, 5), (9,), id="fused-qkv"),
    pytest.param(TTShape.for_matrix(128, 4, 3), TTShape.for_matrix(4, 31, 3), (17,), id="narrower-prime-output"),
    pytest.param(TTShape.for_matrix(60, 1, 3), TTShape.for_matrix(1, 60, 3), (1,), id="rank-one-and-one-row"),
    pytest.param(TTShape.for_matrix(512, 8, 2), TTShape.for_matrix(8, 512, 2), (600,), id="rows-beyond-one-block"),
]


@pytest.mark.parametrize("residual", ["x", "another", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("a", "b", "lead"), CASES)
def test_output_and_every_gradient_are_as_good_as_plain_pytorch(a, b, lead, dtype, residual):
    if residual == "x" and a.in_features != b.out_features:
        residual = "another"
    problem = lora_problem(a, b, lead, dtype, residual=residual)
    ours, plain = solve(tt_lora, problem), solve(reference.tt_lora, problem)
    assert_as_good_as_plain(ours, plain, solve(reference.tt_lora, problem.to(torch.float64)))
    assert ours["y"].dtype is ours["dx"].dtype is dtype


def test_zero_cores_in_the_second_train_leave_the_residual_bit_for_bit():
    problem = lora_problem(TINY_DOWN, TINY_UP, (50,), torch.bfloat16)
    problem.tensors["b"] = torch.zeros_like(problem.tensors["b"])
    assert torch.equal(solve(tt_lora, problem)["y"], problem.tensors["residual"])


def test_is_the_matrix_that_merging_adds():
    problem = lora_problem(TINY_DOWN, TINY_UP, (5,), torch.float64, residual="none")
    a, b = (reference.tt_matrix(problem.tensors[n], s) for n, s in (("a", TINY_DOWN), ("b", TINY_UP)))
    y = problem.tensors["x"] @ (problem.tensors["scale"] * a @ b)
    assert_equal({"y": y}, {"y": solve(tt_lora, problem)["y"]}, 1e-12)


GOOD = lora_problem(TINY_DOWN, TINY_UP, (6,), torch.float32)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.randn(6, 11)}, ValueError, r"x must be \[\.\.\., 12\]"),
        ({"a": torch.randn(5)}, ValueError, r"a must be \[\d+\], got \[5\]"),
        ({"b": torch.randn(5)}, ValueError, r"b must be \[\d+\], got \[5\]"),
        ({"b_shape": "x"}, TypeError, "shape of b must be a TTShape, got str"),
        ({"residual": torch.randn(6, 12)}, ValueError, r"residual must be \[6, 15\]"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p"),
        ({"scale": torch.ones(3)}, ValueError, "one-element"),
    ],
)
def test_names_what_is_wrong(changes, kind, message):
    with pytest.raises(kind, match=message):
        tt_lora(**GOOD.tensors | GOOD.options | changes)
