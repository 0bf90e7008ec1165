"""An operator at one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from loretta_kernels.selfcheck.judge import Row, judged
from loretta_kernels.selfcheck.problem import Problem, exact_problem, random_problem
from loretta_kernels.shape import TTShape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """An operator, its trains and its activation."""

    name: str
    operator: str
    shapes: tuple[TTShape, ...]
    activation: str = "identity"

    @property
    def rank(self) -> int:
        """The largest bond rank."""
        return max(rank for shape in self.shapes for rank in shape.ranks)

    @property
    def in_features(self) -> int:
        """Features of x."""
        return self.shapes[0].in_features

    @property
    def out_features(self) -> int:
        """Features of y."""
        return self.shapes[-1].out_features

    def problem(self, N: int, dtype: torch.dtype, **options: object) -> Problem:
        """A random problem of this case; `options` as of `random_problem`."""
        return random_problem(self.operator, self.shapes, N, dtype, activation=self.activation, **options)  # type: ignore[arg-type]

    def training_problem(self, N: int, dtype: torch.dtype) -> Problem:
        """As `problem`, as layers call it: with a fixed scale."""
        return self.problem(N, dtype, scale=1.0 if self.operator == "tt_linear" else 0.5)

    def compulsory_bytes(self, N: int, itemsize: int) -> tuple[int, int]:
        """What must move: forward reads x and a residual that is not x, writes y; backward reads dy, x, writes dx."""
        I, O = N * self.in_features * itemsize, N * self.out_features * itemsize
        return I + O * (2 if self.operator == "tt_lora" else 1), 2 * I + O


def adapter_case(hidden: int, bottleneck: int, rank: int, activation: str = "relu") -> Case:
    """A series adapter on `hidden` features."""
    shapes = TTShape.for_matrix(hidden, bottleneck, rank), TTShape.for_matrix(bottleneck, hidden, rank)
    name = f"adp {hidden}x{bottleneck}x{rank}" + ("" if activation == "relu" else f" {activation}")
    return Case(name, "tt_adapter", shapes, activation)


def lora_case(in_features: int, out_features: int, r: int, rank: int) -> Case:
    """A reparameterised update beside a linear layer."""
    shapes = TTShape.for_matrix(in_features, r, rank), TTShape.for_matrix(r, out_features, rank)
    return Case(f"rep {in_features}→{out_features} {r} {rank}", "tt_lora", shapes)


def linear_case(size: int, rank: int) -> Case:
    """A square tensorised layer, as in a classifier."""
    return Case(f"cls {size} {rank}", "tt_linear", (TTShape.for_matrix(size, size, rank),))


def check_cases(
    cases: Iterable[Case], dtypes: Iterable[torch.dtype], N: int, device: torch.device | str, backend: str
) -> Iterator[Row]:
    """Every answer of every case in every dtype, for random numbers and, where answers must be exact, whole ones."""
    dtypes = tuple(dtypes)
    for case in cases:
        for dtype in dtypes:
            yield from judged(case.problem(N, dtype).to(device), case.name, backend)
            if case.activation in ("relu", "identity"):
                exact = exact_problem(case.operator, case.shapes, N, dtype, activation=case.activation)
                yield from judged(exact.to(device), f"{case.name} exact", backend)
