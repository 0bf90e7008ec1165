"""The rule by which the answers of the kernels and of C are judged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loretta_kernels import TTShape, backend
from loretta_kernels.selfcheck.errors import FP32_ROUNDINGS
from tests.kernels.problems import Answers, Problem, error, output_grad, solve

DRAWS = 4
FEW = 8  # elements, too few for what cancels in one to be small beside the others


def check(
    function: Callable[..., Tensor], definition: Callable[..., Tensor], problem: Problem, name: str = "triton"
) -> Answers:
    """The backend's errors: at most twice that of plain PyTorch, or of the definition with operands that were rounded.

    Plain PyTorch can be right by luck where an answer has a few elements, whose summands may cancel. What there was to
    lose is seen when x and every parameter are off at random by up to half a unit in the last place of x's dtype, dy by
    half a unit of fp32, and the rest is exact: both implementations round that often, and more; in fp32, and of few
    elements or through few, six times that counts. Neither counts below the roundings of a chain of fp32 products,
    which for the scale, a single sum, are those of its summands.
    """
    with backend(name):
        ours = solve(function, problem)
    exact = problem.to(torch.float64)
    truth, plain = solve(definition, exact), solve(definition, problem)
    rounded = [solve(_with_dy_rounded(definition), _rounded(exact)) for _ in range(DRAWS)]
    assert ours.keys() == truth.keys()
    through_few = _hidden(problem) < FEW
    for name, answer in ours.items():
        few = through_few or answer.numel() < FEW
        roundings = torch.finfo(torch.float32).eps * FP32_ROUNDINGS
        if name == "dscale":
            roundings *= _cancellation(definition, exact)
        elif few:
            roundings *= 4
        of_rounded = (sum(error(each[name], truth[name]) ** 2 for each in rounded) / DRAWS) ** 0.5
        # In fp32 a summand passes several roundings, and of few elements there is no mean.
        of_rounded *= 6 if few or problem.dy_dtype is torch.float32 else 1
        allowed = max(2 * error(plain[name], truth[name]), 2 * of_rounded, torch.finfo(answer.dtype).eps + roundings)
        assert error(answer, truth[name]) <= allowed, f"{name}: {error(answer, truth[name]):.2e} > {allowed:.2e}"
    return ours


def _hidden(problem: Problem) -> int:
    """How many elements there are between the trains of an adapter: each passes through an activation function."""
    x, shape = problem.tensors["x"], problem.options.get("down_shape")
    assert x is not None
    return x.numel() // x.shape[-1] * shape.out_features if isinstance(shape, TTShape) else FEW


def _rounded(exact: Problem) -> Problem:
    """The problem with x and parameters that are off by up to half a unit in the last place of the dtype of x."""
    tensors = dict(exact.tensors)
    for name, tensor in tensors.items():
        if tensor is not None and name != "residual":
            tensors[name] = _off(tensor, exact.dy_dtype)
    return Problem(tensors, exact.options, exact.dy_dtype)


def _with_dy_rounded(definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The definition, whose backward gets a dy that is off as fp32 is: so do sums of dy that cancel show."""

    def rounded(**arguments: object) -> Tensor:
        y = definition(**arguments)
        y.register_hook(lambda dy: _off(dy, torch.float32))
        return y

    return rounded


def _off(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Every element off at random by up to half a unit in the last place of the dtype."""
    return tensor * (1 + torch.finfo(dtype).eps / 2 * (2 * torch.rand_like(tensor) - 1))


def _cancellation(definition: Callable[..., Tensor], exact: Problem) -> float:
    """How much larger the summands of dscale are together than their sum."""
    unscaled = exact.tensors | {"scale": torch.zeros_like(exact.tensors["scale"])}
    y = solve(definition, exact)["y"]
    residual = solve(definition, Problem(unscaled, exact.options, exact.dy_dtype))["y"]
    summands = (y - residual) * output_grad(y, exact)
    return (summands.abs().sum() / summands.sum().abs()).item() if summands.any() else 1.0
