"""What adapters take within a training step on a CPU, measured there: a step's own time varies by more than that.

A layer with an adapter is timed from where its input comes in to where its output leaves, forward and backward, and so
is the same layer of the frozen base; the product with the frozen weight is left out of both. The difference is the
adapter's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import Work

INSIDE = "base_model.model."  # of a wrapped model, the base


class Within:
    """The time that layers of a model take in each run of a step, but for their products with frozen weights.

    Args:
        model: the frozen base, all of whose linear layers are timed from now on; or a wrapped model, and its layers
            with adapters are.
        base: the frozen base.

    Attributes:
        seconds: of each run, by the layer's name in the base: forward and backward together.
    """

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        self.seconds: list[dict[str, float]] = []
        self._entered, self._inside, self._products = 0.0, "", 0
        self._layers = dict(_timed(model, base))
        self._own = dict.fromkeys(self._layers, 0.0)
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(partial(self._before, name))
            layer.register_forward_hook(partial(self._after, name))

    def of(self, step: Work) -> Work:
        """The step, which is measured in every run."""

        def forward() -> Any:
            self._own, self._products = dict.fromkeys(self._layers, 0.0), 0
            with self._products_apart():
                return step.forward()

        def backward(state: Any) -> None:
            assert step.backward is not None
            step.backward(state)
            assert self._products == 2 * len(self._layers), "a frozen weight is multiplied by in another way"
            self.seconds.append(self._own)
            self._own = dict.fromkeys(self._layers, 0.0)  # of runs that are not measured

        return Work(forward, backward)

    def above(self, base: Within) -> list[float]:
        """What the layers took longer than the same layers of the base, run by run."""
        return [
            sum(own[name] - of_base[name] for name in own)
            for own, of_base in zip(self.seconds, base.seconds, strict=True)
        ]

    def _before(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = _Marker.apply(args[0], partial(self._leave, name))
        self._inside = name
        self._enter()
        return x, *args[1:]

    def _after(self, name: str, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        self._leave(name)
        self._inside = ""
        marked: Tensor = _Marker.apply(y, self._enter)
        return marked

    def _enter(self, *_: Any) -> None:
        self._entered = time.process_time()

    def _leave(self, name: str, *_: Any) -> None:
        self._own[name] += time.process_time() - self._entered

    def _pause(self, name: str, *_: Any) -> None:
        self._leave(name)
        self._products += 1

    @contextmanager
    def _products_apart(self) -> Iterator[None]:
        """With `torch.nn.functional.linear`, by which every implementation multiplies by frozen weights, in pauses."""
        linear = F.linear

        def apart(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if weight.requires_grad or not self._inside:
                return linear(x, weight, bias)
            pause = partial(self._pause, self._inside)
            pause()
            y = linear(x, weight, bias)
            self._enter()
            product = _product(y.grad_fn)
            product.register_prehook(pause)
            product.register_hook(self._enter)
            return y

        F.linear = apart
        try:
            yield
        finally:
            F.linear = linear


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


def _timed(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What stands where the base has a linear layer, by its name there; of a wrapped model only what is trained."""
    modules = {name.removeprefix(INSIDE): module for name, module in model.named_modules()}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            layer = modules[name]
            if model is base or any(parameter.requires_grad for parameter in layer.parameters()):
                yield name, layer
