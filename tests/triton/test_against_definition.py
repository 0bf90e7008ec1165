"""Every operator through the kernels: the output and all gradients are as good as plain PyTorch's."""

from __future__ import annotations

import pytest
import torch

from loretta_kernels import ACTIVATIONS, TTShape, reference, tt_adapter, tt_linear, tt_lora
from tests.kernels.problems import (
    TINY_DOWN,
    TINY_UP,
    adapter_problem,
    linear_problem,
    lora_problem,
)

from .judge import check

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def square(size: int, bottleneck: int, rank: int) -> tuple[TTShape, TTShape]:
    """The trains of an adapter of this size."""
    return TTShape.for_matrix(size, bottleneck, rank), TTShape.for_matrix(bottleneck, size, rank)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["x", "another", "none"])
def test_tt_adapter(residual, activation, dtype):
    problem = adapter_problem(*square(96, 12, 3), (2, 35), dtype, residual=residual, activation=activation)
    check(tt_adapter, reference.tt_adapter, problem)


SQUARE = [
    pytest.param(square(768, 64, 5), (21,), id="three-modes-one-not-a-power-of-two"),
    pytest.param(square(4096, 8, 2), (3,), id="four-modes-and-one"),
    pytest.param(square(4096, 16, 2), (3,), id="four-modes-and-two"),
    pytest.param(square(520, 64, 16), (5,), id="rank-that-fills-a-tile"),
    pytest.param(square(23, 5, 2), (67,), id="prime-sizes"),
    pytest.param(square(64, 1, 3), (40,), id="bottleneck-of-one"),
    pytest.param((TTShape((6,), (9, 8, 8), 2), TTShape((9, 8, 8), (6,), 2)), (3,), id="bottleneck-above-a-table"),
    pytest.param(square(64, 6, 3), (1,), id="one-row"),
    pytest.param(square(130, 96, 20), (9,), id="two-blocks-of-bottleneck-and-a-rank-above-a-tile"),
    pytest.param((TTShape((3, 5, 7), (2, 3), (4, 2, 6, 3)), TTShape((6,), (105,), 3)), (9,), id="a-rank-per-bond"),
]


@every_dtype
@pytest.mark.parametrize(("shapes", "lead"), SQUARE)
def test_tt_adapter_of_any_shape(shapes, lead, dtype):
    check(tt_adapter, reference.tt_adapter, adapter_problem(*shapes, lead, dtype, activation="silu"))


@every_dtype
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_takes_parameters_in_the_dtype_of_x(biases, dtype):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (40,), dtype, residual="none", biases=biases).to(dtype)
    assert {answer.dtype for answer in check(tt_adapter, reference.tt_adapter, problem).values()} == {dtype}


LINEAR = [
    pytest.param(TTShape.for_matrix(768, 768, 5), (7,), id="classifier"),
    pytest.param(TTShape((2, 3, 2, 3, 2, 9), (2, 3, 2, 2, 3, 9), 3), (20,), id="six-modes-a-side"),
    pytest.param(TTShape((521,), (2, 3), (4, 3)), (70,), id="one-large-mode"),
    pytest.param(TTShape((2, 2), (1031,), (3, 4)), (3,), id="one-large-mode-on-the-way-out"),
    pytest.param(TTShape((1,), (1,), 1), (2,), id="all-of-one"),
    pytest.param(TTShape((6, 8), (6,), 64), (5,), id="rank-64"),
]


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("shape", "lead"), LINEAR)
def test_tt_linear(shape, lead, bias, dtype):
    check(tt_linear, reference.tt_linear, linear_problem(shape, lead, dtype, bias=bias))


LORA = [
    pytest.param(TTShape.for_matrix(256, 8, 5), TTShape.for_matrix(8, 256, 5), (33,), id="square"),
    pytest.param(TTShape.for_matrix(256, 16, 8), TTShape.for_matrix(16, 97, 3), (2, 3), id="to-a-prime"),
]


@every_dtype
@pytest.mark.parametrize(("a_shape", "b_shape", "lead"), LORA)
def test_tt_lora(a_shape, b_shape, lead, dtype):
    check(tt_lora, reference.tt_lora, lora_problem(a_shape, b_shape, lead, dtype))
