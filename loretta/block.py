"""LoRETTA_adp at a whole block of the base model, such as a sparse mixture of experts, which is not a linear layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .adp import LorettaAdpLinear

NAME = "loretta_block"  # must not contain the method's prefix, by which PEFT recognises an adapter's own modules


class LorettaAdpBlock(LorettaAdpLinear):
    """Adapters at the entrance or the exit of a block, or beside it.

    It is a child of the block and acts through the block's forward hooks: the block stays the module that it was, with
    its name, its class and its attributes, whatever replaces its ``forward``. Of a block that returns a tuple the first
    element is adapted. An adapter beside a block reads what enters it.

    Args:
        block: a module from [..., width] to [..., width].
        width: the block's width.
    """

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__(block, width=width)
        self.first_argument = next(iter(inspect.signature(block.forward).parameters), "")
        self._hooks = [
            block.register_forward_pre_hook(_enter, with_kwargs=True),
            block.register_forward_hook(_leave, with_kwargs=True),
        ]
        setattr(block, NAME, self)

    def detach_from_block(self) -> None:
        """Leave the block as it was."""
        for hook in self._hooks:
            hook.remove()
        delattr(self.base_layer, NAME)

    def forward(  # type: ignore[override]
        self, value: torch.Tensor, x: Any, *placements: str, adapter_names: list[str] | None = None
    ) -> torch.Tensor:
        """value [..., width] with the active adapters of these placements.

        Args:
            value: what enters the block, or what leaves it; the latter may be flattened to [rows, width].
            x: what enters the block.
            placements: of the adapters that act.
            adapter_names: an adapter for each row of the batch, as in PEFT's mixed batches.

        Raises:
            ValueError: value is not [..., width].
        """
        batch = x if isinstance(x, torch.Tensor) else value
        acting = self._acting(batch, adapter_names)
        if not acting:
            return value
        if value.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"the adapters at {type(self.base_layer).__name__} are for [..., {self.in_features}], got "
                f"{list(value.shape)}"
            )
        flattened = value.shape != batch.shape and value.numel() == batch.numel()
        rows = value.reshape(batch.shape) if flattened else value
        for placement in placements:
            rows = self._placed(placement, acting, rows, batch if placement == "parallel_adapter" else rows)
        return rows.reshape(value.shape) if flattened else rows

    def entering(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The block's arguments with the adapters at its entrance; None: as they are."""
        if "mh_adapter" not in self.placement.values():
            return None
        x = self._input(args, kwargs)
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"an adapter at the entrance of {type(self.base_layer).__name__} needs its input as the first argument "
                f"or as {self.first_argument!r}, got {type(x).__name__}"
            )
        x = self(x, x, "mh_adapter")
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self.first_argument: x})

    def leaving(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The block's output with the adapters at its exit and beside it."""
        hidden = output[0] if type(output) is tuple else output
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(
                f"an adapter at the exit of {type(self.base_layer).__name__} needs a tensor or a tuple that begins "
                f"with one, got {type(output).__name__}"
            )
        hidden = self(hidden, self._input(args, kwargs), "output_adapter", "parallel_adapter")
        return (hidden, *output[1:]) if type(output) is tuple else hidden

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs.get(self.first_argument)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises.

        Raises:
            ValueError: a block has no one weight that could hold its adapter.
        """
        raise ValueError(
            f"the adapter at {type(self.base_layer).__name__} cannot be merged: a block has no one weight to hold it"
        )

    @property
    def bias(self) -> None:  # type: ignore[override]
        """None: bias="adapter_only" trains the biases of linears; a block may call anything its bias, a flag too."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        weights = [weight for weight in base_layer.parameters() if weight.is_floating_point()]
        return (weights[0].device, weights[0].dtype) if weights else (None, None)


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # By name, not as a bound method: a replica of the block must call its own copy of the adapters.
    return getattr(block, NAME).entering(args, kwargs)


def _leave(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return getattr(block, NAME).leaving(args, kwargs, output)


def block_width(model: nn.Module, key: str) -> int:
    """The width of the block called ``key``.

    It is the hidden size of the nearest config above the block, if the block has weights of that size, or else the
    number that its first linear takes and its last linear gives.

    Raises:
        ValueError: the module is no block with features in its last dimension, or its width cannot be told.
    """
    block = model.get_submodule(key)
    kind = type(block).__name__
    if type(block).forward is nn.Module.forward or isinstance(block, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(
            f"target module {key!r}: LoRETTA_adp adapts linears, and blocks from [..., width] to [..., width], "
            f"got {kind}"
        )
    own = [module for name, module in block.named_modules() if "loretta_" not in name]
    linears = [module for module in own if hasattr(module, "in_features")]
    sizes = {size for linear in linears for size in (linear.in_features, linear.out_features)}
    for weight in block.parameters():
        sizes.update(getattr(weight, "ds_shape", weight.shape))  # ZeRO-3 leaves a parameter no size of its own
    parts = key.split(".")
    for length in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        if (hidden := getattr(config, "hidden_size", 0)) in sizes:
            return hidden
    if linears and linears[0].in_features == linears[-1].out_features:
        return linears[0].in_features
    raise ValueError(
        f"target module {key!r}: the width of this {kind} cannot be told: no config above it has a hidden_size that "
        f"its weights have, and its first linear does not take what its last one gives. Name linears inside it instead"
    )
