"""The rule by which the kernels' answers are judged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loretta_kernels import backend
from tests.kernels.problems import Answers, Problem, error, solve


def check(function: Callable[..., Tensor], definition: Callable[..., Tensor], problem: Problem) -> Answers:
    """At most twice plain PyTorch's error, and a little more where an answer is too small to average the luck over."""
    with backend("triton"):
        ours = solve(function, problem)
    plain, truth = solve(definition, problem), solve(definition, problem.to(torch.float64))
    assert ours.keys() == truth.keys()
    for name, answer in ours.items():
        rounding = torch.finfo(answer.dtype).eps + 2 * torch.finfo(torch.float32).eps
        allowed = max(2 * error(plain[name], truth[name]), rounding) * (1 + 8 / max(1, answer.numel()) ** 0.5)
        assert error(answer, truth[name]) <= allowed, f"{name}: {error(answer, truth[name]):.2e} > {allowed:.2e}"
    return ours
