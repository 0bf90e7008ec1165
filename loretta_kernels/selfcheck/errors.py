"""The error of every output and gradient, and what it may be: twice that of plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loretta_kernels.selfcheck.cases import Arguments, Case, random_arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 3  # an error is that of all draws taken together: a single sum may cancel
FP32_ROUNDINGS = 16  # of the chain of fp32 products that an answer passes, however plain PyTorch rounds

Answers = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One output or gradient: its relative error against fp64, and the bar."""

    case: str
    operator: str
    N: int
    dtype: str
    answer: str
    error: float
    bar: float

    @property
    def missed(self) -> bool:
        """Whether the error is above the bar; not a number counts as above."""
        return not self.error <= self.bar

    @property
    def text(self) -> str:
        """On one line."""
        return f"{self.case}, {self.dtype}: {self.answer} is off by {self.error:.1e}, {self.bar:.1e} is allowed"


def check(
    cases: Iterable[Case], dtypes: Iterable[torch.dtype], N: int, device: torch.device, draws: int = DRAWS
) -> Iterator[Row]:
    """Every output and gradient of every case in every dtype, for N rows."""
    dtypes = tuple(dtypes)
    for case in cases:
        for dtype in dtypes:
            yield from _check(case, dtype, N, device, draws)


def _check(case: Case, dtype: torch.dtype, N: int, device: torch.device, draws: int) -> Iterator[Row]:
    truths, plains, ours = [], [], []
    for seed in range(draws):
        arguments, dy = random_arguments(case, N, dtype, device, seed)
        truths.append(_answers(case.definition(), _to(arguments, torch.float64), dy))
        plains.append(_answers(case.definition(), _to(arguments, dtype), dy))
        ours.append(_answers(case.function(), arguments, dy))
    for name, answer in ours[0].items():
        rounding = torch.finfo(answer.dtype).eps + FP32_ROUNDINGS * torch.finfo(torch.float32).eps
        if answer.numel() == 1:  # no other elements to average the luck over
            rounding *= 10
        bar = max(2 * _error(name, plains, truths), rounding)
        error = _error(name, ours, truths)
        yield Row(case.name, case.operator, N, str(dtype).removeprefix("torch."), name, error, bar)


def _answers(function: Callable[..., Tensor], arguments: Arguments, dy: Tensor) -> Answers:
    """The output y and the gradient of every tensor."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items() if isinstance(t, Tensor)}
    given = arguments | leaves
    if given.get("residual") == "x":
        given["residual"] = leaves["x"]
    y = function(**given)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _to(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same values with every tensor in `dtype`."""
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _error(name: str, answers: list[Answers], truths: list[Answers]) -> float:
    """The relative error of one answer, of all its elements in all draws."""
    truth = torch.stack([each[name].double() for each in truths])
    difference = (torch.stack([each[name].double() for each in answers]) - truth).norm().item()
    size = truth.norm().item()
    return difference / size if size else difference
