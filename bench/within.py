"""What adapters take within a training step on a CPU, measured there: a step's own time varies by more than that.

A layer with an adapter is timed from where its input comes in to where its output leaves, forward and backward, and of
that the product with the frozen weight is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import Work

INSIDE = "base_model.model."  # of a wrapped model, the base


class Within:
    """The time that a wrapped model's adapters take in each run of a step.

    Args:
        model: a wrapped model, or the base itself. From now on its layers with adapters are timed.
        base: the base, or a copy.

    Attributes:
        layers: how many there are.
        seconds: of each run, forward and backward together.
    """

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        self.seconds: list[float] = []
        self._own, self._entered, self._inside, self._products = 0.0, 0.0, False, 0
        layers = list(_adapted(model, base))
        self.layers = len(layers)
        for layer in layers:
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after)

    def of(self, step: Work) -> Work:
        """The step, which is measured in every run."""

        def forward() -> Any:
            self._own, self._products = 0.0, 0
            with self._products_apart():
                return step.forward()

        def backward(state: Any) -> None:
            assert step.backward is not None
            step.backward(state)
            assert self._products == 2 * self.layers, "a frozen weight is multiplied by in another way"
            self.seconds.append(self._own)

        return Work(forward, backward)

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = _Marker.apply(args[0], self._leave)
        self._inside = True
        self._enter()
        return x, *args[1:]

    def _after(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        self._leave()
        self._inside = False
        marked: Tensor = _Marker.apply(y, self._enter)
        return marked

    def _enter(self, *_: Any) -> None:
        self._entered = time.process_time()

    def _leave(self, *_: Any) -> None:
        self._own += time.process_time() - self._entered

    @contextmanager
    def _products_apart(self) -> Iterator[None]:
        """With `torch.nn.functional.linear`, by which every implementation multiplies by frozen weights, in pauses."""
        linear = F.linear

        def apart(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if weight.requires_grad or not self._inside:
                return linear(x, weight, bias)
            self._pause()
            y = linear(x, weight, bias)
            self._enter()
            product = _product(y.grad_fn)
            product.register_prehook(self._pause)
            product.register_hook(self._enter)
            return y

        F.linear = apart
        try:
            yield
        finally:
            F.linear = linear

    def _pause(self, *_: Any) -> None:
        self._leave()
        self._products += 1


class _Marker(torch.autograd.Function):
    """The input itself; backward calls a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Any) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return dx, None


def _product(node: Any) -> Any:
    """The node of a linear map's graph that multiplies by the weight."""
    while not any(part in node.name() for part in ("Mm", "Linear")):
        node = node.next_functions[0][0]
    return node


def _adapted(model: nn.Module, base: nn.Module) -> Iterator[nn.Module]:
    """What stands where the base has a linear layer, and is trained."""
    modules = {name.removeprefix(INSIDE): module for name, module in model.named_modules()}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and any(parameter.requires_grad for parameter in modules[name].parameters()):
            yield modules[name]
