"""The rule by which the kernels' answers are judged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loretta_kernels import backend
from tests.kernels.problems import Answers, Problem, error, solve

DRAWS = 4


def check(function: Callable[..., Tensor], definition: Callable[..., Tensor], problem: Problem) -> Answers:
    """At most twice the error of plain PyTorch, or of the definition with parameters that were rounded.

    An answer of a few elements can be right in plain PyTorch by luck. What it has to lose is seen when each parameter
    is rounded to the dtype of x at random, up or down, and the rest is exact: plain PyTorch rounds them too, and more.
    """
    with backend("triton"):
        ours = solve(function, problem)
    truth = solve(definition, problem.to(torch.float64))
    plain = solve(definition, problem)
    rounded = [solve(definition, _rounded(problem)) for _ in range(DRAWS)]
    assert ours.keys() == truth.keys()
    for name, answer in ours.items():
        luck = sum(error(each[name], truth[name]) ** 2 for each in rounded) ** 0.5 / DRAWS**0.5
        rounding = torch.finfo(answer.dtype).eps + 2 * torch.finfo(torch.float32).eps
        allowed = max(2 * error(plain[name], truth[name]), 2 * luck, rounding)
        off = error(answer, truth[name])
        LOG.append((off/allowed, name, answer.numel(), off, error(plain[name], truth[name]), luck, rounding, problem))
    return ours

LOG=[]

def _rounded(problem: Problem) -> Problem:
    """The problem in fp64, its parameters off by up to half a unit in the last place of the dtype of x."""
    half = torch.finfo(problem.dy_dtype).eps / 2
    exact = problem.to(torch.float64)
    for name, tensor in exact.tensors.items():
        if tensor is not None and name not in ("x", "residual"):
            exact.tensors[name] = tensor * (1 + half * (2 * torch.rand_like(tensor) - 1))
    return exact
