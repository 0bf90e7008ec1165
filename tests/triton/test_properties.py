"""What holds of the kernels however they are called: strides, both ways to sum, few programs."""

from __future__ import annotations

import pytest
import torch

from loretta_kernels import TTShape, backend, tt_adapter, tt_linear, tt_matrix
from tests.kernels.problems import (
    TINY_DOWN,
    TINY_UP,
    adapter_problem,
    assert_equal,
    linear_problem,
    solve,
)

pytest.importorskip("triton")

LAYOUTS = {
    "transposed": lambda N, I: torch.randn(I, N).t(),
    "every-second-row": lambda N, I: torch.randn(2 * N, I)[::2],
    "wide-rows": lambda N, I: torch.randn(N, 3 * I)[:, I : 2 * I],
    "one-row-repeated": lambda N, I: torch.randn(1, I).expand(N, I),
    "three-dimensions-cut": lambda N, I: torch.randn(2, N, I)[:, : N // 2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_takes_any_strides(layout):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (12,), torch.float32, residual="another")
    strided = {"x": layout(12, 12), "residual": layout(12, 15)}
    dy = layout(12, 15)
    outcomes = []
    for prepare in (lambda t: t, lambda t: t.contiguous()):
        views = {name: t.detach().requires_grad_() for name, t in strided.items()}
        with backend("triton"):
            y = tt_adapter(**problem.tensors | {k: prepare(t) for k, t in views.items()} | problem.options)
            outcomes.append((y, *torch.autograd.grad(y, list(views.values()), prepare(dy))))
    for ours, contiguous in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, contiguous, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [9, 300])
@pytest.mark.parametrize("sums", ["atomic", "ordered"])
def test_both_ways_to_sum_agree_and_the_ordered_one_is_always_the_same(sums, rows):
    problem = adapter_problem(TTShape.for_matrix(96, 12, 3), TTShape.for_matrix(12, 96, 3), (rows,), torch.float32)
    with backend("triton"):
        atomic = solve(tt_adapter, problem)
        torch.use_deterministic_algorithms(sums == "ordered", warn_only=True)
        first, second = solve(tt_adapter, problem), solve(tt_adapter, problem)
    assert_equal(first, second, 0)
    assert_equal(first, atomic, 1e-4)


@pytest.mark.parametrize("programs", [1, 2, 5])
@pytest.mark.parametrize("ordered", [False, True])
def test_fewer_programs_than_blocks_give_the_same(programs, ordered, monkeypatch):
    from loretta_kernels._triton import plan

    problem = adapter_problem(TINY_DOWN, TINY_UP, (300,), torch.float32, residual="none")
    torch.use_deterministic_algorithms(ordered, warn_only=True)
    with backend("triton"):
        many = solve(tt_adapter, problem)
        few = plan.Plan.programs
        monkeypatch.setattr(plan.Plan, "programs", lambda *args: min(few(*args), programs))
        assert_equal(solve(tt_adapter, problem), many, 1e-4)


def test_a_frozen_train_gives_the_same_bits():
    problem = linear_problem(TINY_DOWN, (30,), torch.float32)
    with backend("triton"):
        trained = solve(tt_linear, problem)["y"]
        assert torch.equal(trained, tt_linear(**problem.tensors | problem.options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_the_scale_sees_parameters_that_x_s_dtype_would_round(dtype):
    """All but the last core are whole numbers, so that its rounding to 16 bits would be the only error."""
    torch.manual_seed(0)
    down, up = TTShape([4, 4], [8], 3), TTShape([8], [16], 3)
    whole = lambda *size: torch.randint(-2, 3, size).float()  # noqa: E731
    x, cores_down = whole(5, 16).to(dtype), whole(down.num_params)
    cores_up = torch.cat([whole(24), torch.randn(48)])
    scale, dy = torch.ones((), requires_grad=True), whole(5, 16).to(dtype)
    with backend("triton"):
        y = tt_adapter(x, cores_down, down, None, cores_up, up, None, activation="identity", scale=scale)
    (dscale,) = torch.autograd.grad(y, scale, dy)
    exact = x.double() @ tt_matrix(cores_down.double(), down) @ tt_matrix(cores_up.double(), up)
    summands = exact * dy.double()
    assert abs(dscale - summands.sum()) <= 1e-5 * summands.norm()
