"""The error of every output and gradient, and what it may be: twice that of plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loretta_kernels.selfcheck.cases import Arguments, Case, random_arguments

FP32_ROUNDINGS = 8  # of the chain of fp32 products that an answer passes, however plain PyTorch rounds


@dataclass(frozen=True)
class Row:
    """One output or gradient: its relative error against fp64, and the bar."""

    case: str
    dtype: str
    answer: str
    error: float
    bar: float

    @property
    def missed(self) -> bool:
        """Whether the error is above the bar; not a number counts as above."""
        return not self.error <= self.bar


def check(cases: Iterable[Case], dtypes: Iterable[torch.dtype], N: int, device: torch.device) -> Iterator[Row]:
    """Every output and gradient of every case in every dtype."""
    dtypes = tuple(dtypes)
    for case in cases:
        for dtype in dtypes:
            yield from _check(case, random_arguments(case, N, dtype, device), dtype)


def _check(case: Case, arguments: Arguments, dtype: torch.dtype) -> Iterator[Row]:
    truth = _answers(case.definition(), _to(arguments, torch.float64), dtype)
    plain = _answers(case.definition(), _to(arguments, dtype), dtype)
    for name, answer in _answers(case.function(), arguments, dtype).items():
        rounding = torch.finfo(answer.dtype).eps + FP32_ROUNDINGS * torch.finfo(torch.float32).eps
        if answer.numel() == 1:  # a sum that may cancel, with no other elements to average the luck over
            rounding *= 10
        bar = max(2 * _error(plain[name], truth[name]), rounding)
        yield Row(case.name, str(dtype).removeprefix("torch."), name, _error(answer, truth[name]), bar)


def _answers(function: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output y and the gradient of every tensor, for a fixed dy that `dtype` holds exactly."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items() if isinstance(t, Tensor)}
    given = arguments | leaves
    if given.get("residual") == "x":
        given["residual"] = leaves["x"]
    y = function(**given)
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).reshape(y.shape).to(dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _to(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same values with every tensor in `dtype`."""
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _error(answer: Tensor, truth: Tensor) -> float:
    """The relative error of a whole tensor."""
    size = truth.double().norm().item()
    difference = (answer.double() - truth.double()).norm().item()
    return difference / size if size else difference
