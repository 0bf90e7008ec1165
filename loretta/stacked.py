"""Several adapters of one shape and configuration at a layer, stacked as the grouped operators take them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch

from loretta_kernels import TT, Groups

from .tensor_train import TensorTrain

if TYPE_CHECKING:
    from .layer import LorettaLayer


class Trains(NamedTuple):
    """The two trains of an adapter at a layer, or those of stacked adapters.

    Attributes:
        like: the adapter whose placement, activation, dropout and the like they have.
        down, up: of rep A and B; of stacked adapters with cores [adapters, num_params].
        scale: a number, or learnt: one element; of stacked adapters [adapters].
    """

    like: str
    down: TT
    up: TT
    scale: float | torch.Tensor


class Mixed(NamedTuple):
    """A batch whose rows use different adapters of a stack: ``groups`` has one for each row, -1 for none."""

    trains: Trains
    groups: Groups | torch.Tensor


class _Stack:
    """The latest stack of a layer, for as long as its adapters have the values that they had."""

    def __init__(self, trains: Sequence[TensorTrain]) -> None:
        self._modules = [ref(train) for train in trains]
        self._tensors: dict[str, torch.Tensor] = {}

    def is_of(self, trains: Sequence[TensorTrain]) -> bool:
        """Whether it is of these very modules."""
        return len(trains) == len(self._modules) and all(
            known() is train for known, train in zip(self._modules, trains, strict=True)
        )

    def of(self, name: str, tensors: Sequence[Any]) -> torch.Tensor:
        """The tensors stacked; without gradients on a CPU the same tensor as before where the values are the same.

        The operators remember by it what they contracted.
        """
        stack, known = torch.stack(tensors), self._tensors.get(name)  # type: ignore[arg-type]
        if stack.requires_grad or torch.compiler.is_compiling() or stack.device.type != "cpu":
            return stack
        if known is None or known.dtype is not stack.dtype or not torch.equal(known, stack):
            known = self._tensors[name] = stack
        return known


_stacks: WeakKeyDictionary[LorettaLayer, _Stack] = WeakKeyDictionary()


def stacked(layer: LorettaLayer, names: tuple[str, ...]) -> Trains | None:
    """The named adapters of a layer, stacked; None where their shapes or configurations differ, or are no trains."""
    kinds = [getattr(layer, kind)._modules for kind in layer.adapter_layer_names[:2]]  # quicker than a ModuleDict
    trains = [kind[name] for kind in kinds for name in names if isinstance(kind[name], TensorTrain)]
    if len(trains) < 2 * len(names) or len({layer.settings(name) for name in names}) > 1:
        return None
    downs, ups = trains[: len(names)], trains[len(names) :]
    known = _stacks.get(layer)
    if known is None or not known.is_of(trains):
        if any(len({train.shape for train in side}) > 1 for side in (downs, ups)):
            return None
        known = _stacks[layer] = _Stack(trains)

    def stack(kind: str, these: Sequence[TensorTrain]) -> TT:
        def of(name: str) -> torch.Tensor:
            return known.of(f"{kind} {name}", [train._parameters[name] for train in these])

        return TT(of("cores"), these[0].shape, None if these[0].bias is None else of("bias"))

    scale = layer.scale(names[0])
    if isinstance(scale, torch.Tensor):
        scale = known.of("scale", [layer.scale(name) for name in names]).view(-1)
    return Trains(names[0], stack("down", downs), stack("up", ups), scale)


def index_of(adapter_names: Sequence[str], names: tuple[str, ...], device: torch.device) -> Groups | torch.Tensor:
    """Which of the names each row of a batch has, -1 for another; sorted once for all layers."""
    if torch.compiler.is_compiling():
        return torch.tensor([names.index(name) if name in names else -1 for name in adapter_names], device=device)
    return _groups(tuple(adapter_names), names, device)


@lru_cache(maxsize=8)
def _groups(adapter_names: tuple[str, ...], names: tuple[str, ...], device: torch.device) -> Groups:
    numbers = {name: number for number, name in enumerate(names)}
    return Groups.of(torch.tensor([numbers.get(name, -1) for name in adapter_names]), len(names), device)
