"""An operator at one shape, and random arguments for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

import loretta_kernels
from loretta_kernels import reference
from loretta_kernels.shape import TTShape

Arguments = dict[str, Any]
KINK = 1e-4


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

    def function(self) -> Callable[..., Tensor]:
        """The public operator."""
        return getattr(loretta_kernels, self.operator)

    def definition(self) -> Callable[..., Tensor]:
        """Its definition."""
        return getattr(reference, self.operator)

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


def random_arguments(
    case: Case, N: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Arguments, Tensor]:
    """Every argument of the operator, and dy: rows in `dtype`, parameters in fp32; a residual "x" means x itself."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def cores(shape: TTShape) -> Tensor:
        """Cores whose matrix maps unit-sized features to unit-sized features."""
        paths = prod(shape.ranks) * shape.in_features
        return normal(shape.num_params) * paths ** (-0.5 / len(shape.modes))

    first, last = case.shapes[0], case.shapes[-1]
    arguments: Arguments = {"x": normal(N, first.in_features).to(dtype)}
    if case.operator == "tt_linear":
        arguments |= {"cores": cores(first), "shape": first, "bias": normal(last.out_features)}
    elif case.operator == "tt_lora":
        residual = normal(N, last.out_features).to(dtype)
        arguments |= {"a": cores(first), "a_shape": first, "b": cores(last), "b_shape": last}
        arguments |= {"residual": residual, "scale": torch.tensor(0.7)}
    else:
        arguments |= {"down": cores(first), "down_shape": first, "down_bias": normal(first.out_features)}
        arguments |= {"up": cores(last), "up_shape": last, "up_bias": normal(last.out_features)}
        arguments |= {"residual": "x", "activation": case.activation, "scale": torch.tensor(0.7)}
        if case.activation == "relu":
            _avoid_kink(arguments)
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return on_device, normal(N, last.out_features).to(device, dtype)


def _avoid_kink(arguments: Arguments) -> None:
    """Zero the rows of x that lead relu so near to 0 that a rounding could decide its derivative."""
    x, down, bias = (arguments[name].double() for name in ("x", "down", "down_bias"))
    h = reference.tt_linear(x, down, arguments["down_shape"], bias)
    arguments["x"][(h.abs() < KINK).any(dim=1)] = 0
