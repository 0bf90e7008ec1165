"""The judge is red where an operator is wrong in ways that a tolerance could hide, and green where it is right."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import loretta_kernels
from loretta_kernels import TT
from loretta_kernels.selfcheck import check, exact_problem, random_problem
from tests.kernels.problems import square


def with_gradient(change):
    """The identity, with this change of the gradient."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, gradient):
            return change(gradient)

    return Changed.apply


truncated_to_bf16 = with_gradient(lambda g: (g.view(torch.int32) & -65536).view(torch.float32))
zeroed = with_gradient(torch.zeros_like)


def truncates_core_gradients(x, down, up, **options):
    trains = (TT(truncated_to_bf16(train.cores), train.shape, train.bias) for train in (down, up))
    return loretta_kernels.tt_adapter(x, *trains, **options)


def has_no_gradient_of_the_scale(x, down, up, *, scale, **options):
    return loretta_kernels.tt_adapter(x, down, up, scale=zeroed(scale), **options)


def drops_the_last_rows_from_the_sums(x, down, up, *, residual, **options):
    cut = len(x) - 16
    first = loretta_kernels.tt_adapter(x[:cut], down, up, residual=residual[:cut], **options)
    constant = [TT(train.cores.detach(), train.shape, train.bias.detach()) for train in (down, up)]
    last = loretta_kernels.tt_adapter(x[cut:], *constant, residual=residual[cut:], **options)
    return torch.cat([first, last])


def problem_of(kind, dtype, seed=0, rows=300):
    make = {"exact": exact_problem, "random": random_problem}[kind]
    return make("tt_adapter", square(96, 12, 3), rows, dtype, activation="relu", seed=seed)


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def assert_red(problem, wrong, *answers):
    with pytest.raises(AssertionError) as found:
        check(problem, "torch", SimpleNamespace(tt_adapter=wrong))
    assert all(re.search(f": {answer} is off by", str(found.value)) for answer in answers)


@every_dtype
@pytest.mark.parametrize("kind", ["exact", "random"])
def test_what_is_right_is_green(kind, dtype):
    check(problem_of(kind, dtype), "torch")


@every_dtype
def test_core_gradients_truncated_to_bf16_are_red(dtype):
    assert_red(problem_of("exact", dtype), truncates_core_gradients, "d(down|up)")


@every_dtype
def test_a_dropped_block_of_rows_is_red(dtype):
    for kind in ("exact", "random"):
        assert_red(problem_of(kind, dtype), drops_the_last_rows_from_the_sums, "ddown", "dup", "dup_bias")


def test_a_zero_gradient_of_the_scale_is_red_in_every_draw():
    for seed in range(60):
        assert_red(problem_of("random", torch.float32, seed, rows=40), has_no_gradient_of_the_scale, "dscale")
    for dtype in (torch.bfloat16, torch.float16):
        assert_red(problem_of("exact", dtype), has_no_gradient_of_the_scale, "dscale")
