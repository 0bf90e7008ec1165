"""What the layers of both methods share: the base linear's geometry and which adapters take part in a forward."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from loretta_kernels import TTShape
from loretta_kernels.start import start_, stored_gains, with_gains

from .config import _LorettaConfig
from .merging import Merging
from .stacked import Mixed, Trains, index_of, stacked
from .tensor_train import TensorTrain
from .whole import TrainedWhole

# Adapters and the rows [n] they act on, None for all rows; or stacked ones, each for its rows.
Acting = list[tuple[list[str], "torch.Tensor | None"]] | Mixed
Act = Callable[[list[str], torch.Tensor, torch.Tensor], torch.Tensor]


class LorettaLayer(Merging):
    """A layer of the base model with adapters beside or around it.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, a linear quantised by a backend PEFT knows, or a PEFT layer
            around one of these.
        width: where base_layer is a whole block from [..., width] to [..., width], whose child this layer becomes.
        quantization_kwargs: what PEFT's quantisation backends need to requantise on merging.

    Raises:
        TypeError: base_layer is none of these.
    """

    def __init__(self, base_layer: nn.Module, width: int | None = None, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.training = base_layer.training  # an adapter added to a model in eval mode must not drop anything
        self._disable_adapters = False
        self.served: Mixed | None = None  # what acts instead of this layer's own adapters
        self.trained_whole: list[TrainedWhole] = []  # all of the model's; in a list they are no submodules
        self.in_features: int
        self.out_features: int
        if width is not None:
            self.__dict__["base_layer"] = base_layer  # no child of this layer: the block holds it
            self.in_features = self.out_features = width
            return
        self.base_layer = base_layer
        linear = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(linear, **quantization_kwargs)
        if self.quantization_backend is None and not isinstance(linear, (nn.Linear, Conv1D)):
            raise TypeError(
                f"LoRETTA adapts torch.nn.Linear, transformers' Conv1D and the quantised linears PEFT knows, "
                f"got {type(linear).__name__}"
            )
        self.in_features, self.out_features = _get_in_out_features(linear)  # type: ignore[assignment]

    @abstractmethod
    def add_adapter(self, adapter_name: str, config: _LorettaConfig, key: str) -> None:
        """Create the adapter's weights. ``key`` is the module's name, for the patterns of the config."""

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether this layer holds an adapter of that name."""
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; on with the norms and heads trained beside them.

        transformers' ``model.enable_adapters()`` calls PEFT's layers alone, its ``disable_adapters()`` both.
        """
        super().enable_adapters(enabled)
        for module in self.trained_whole:
            if enabled and module.disable_adapters:
                module.enable_adapters(True)

    def follow_base_dtype(self, adapter_name: str) -> None:
        """Hold an adapter's weights in the dtype of the base layer, where that is a floating-point one."""
        super()._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the dtype of the base layer, which would round weights that were just loaded.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for kind in self.adapter_layer_names:
            weights = getattr(self, kind)
            if adapter_name in weights and not any(p.is_meta for p in weights[adapter_name].parameters()):
                weights[adapter_name].to(device)

    @abstractmethod
    def trains(self, adapter_name: str) -> Trains:
        """The adapter's two trains and its scale."""

    @abstractmethod
    def settings(self, adapter_name: str) -> tuple[Any, ...]:
        """What else adapters must have in common to be stacked."""

    @abstractmethod
    def scale(self, adapter_name: str) -> float | torch.Tensor:
        """What the adapter's output is multiplied by."""

    @abstractmethod
    def adapted(self, x: torch.Tensor, acting: Acting, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer, run once on all rows, with the adapters that act on each row."""

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x [..., in_features] to [..., out_features].

        ``adapter_names`` names an adapter for each row of the batch ("__base__": none), as in PEFT's mixed batches.
        """
        return self.adapted(x, self._acting(x, adapter_names), *args, **kwargs)

    def _acting(self, x: torch.Tensor, adapter_names: list[str] | None) -> Acting:
        """Which adapters act on which rows of the batch x."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if self.served is not None:
            if self.merged or adapter_names is not None:
                raise ValueError("stacked adapters are served: not with `adapter_names`, nor while adapters are merged")
            return self.served
        if adapter_names is None:
            if self.merged:
                self.merge_changes()
                return []
            active = [name for name in self.active_adapters if self.has_adapter(name)]
            return [(active, None)] if active else []
        if len(x) != len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"names and {len(x)} inputs"
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        given = set(adapter_names)
        names = tuple(sorted(given & getattr(self, self.adapter_layer_names[0]).keys()))
        if len(given) == 1:
            return [([name], None) for name in names]
        if len(names) > 1 and (trains := stacked(self, names)) is not None:
            return Mixed(trains, index_of(adapter_names, names, x.device))
        rows: dict[str, list[int]] = {name: [] for name in names}
        for row, name in enumerate(adapter_names):
            if name in rows:
                rows[name].append(row)
        return [([name], torch.tensor(index, device=x.device)) for name, index in rows.items()]

    @staticmethod
    def _on_rows(
        act: Act, acting: list[tuple[list[str], torch.Tensor | None]], value: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """``act(names, value, x)`` on the rows of each group; the rows of no group keep their value.

        Args:
            act: what the named adapters make of value [rows, ...], given x [rows, ...].
            acting: the adapters, and the rows of value and x that they act on.
            value, x: one tensor or two, with the same rows.
        """
        result = value
        for names, rows in acting:
            if rows is None:
                return act(names, value, x)
            if result is value:
                result = value.clone()
            mine = value[rows]
            result.index_copy_(0, rows, act(names, mine, mine if x is value else x[rows]).to(result.dtype))
        return result


def bond_rank(config: _LorettaConfig, key: str) -> int:
    """The rank of the bonds of the trains at the module called ``key``."""
    ranks = config.tensor_rank_pattern
    return ranks.get(get_pattern_key(list(ranks), key), config.tensor_rank)


def dropout_probability(dropout: nn.Module, training: bool) -> float:
    """The probability with which a layer in that mode drops elements."""
    assert isinstance(dropout, nn.Dropout)
    return dropout.p if training else 0.0


def train_shape(config: _LorettaConfig, in_features: int, out_features: int, rank: int) -> TTShape:
    """The train of a matrix [in_features, out_features]: the config's own where it names that matrix or a size."""
    if explicit := config.matrix_shape(in_features, out_features):
        return explicit
    default = TTShape.for_matrix(in_features, out_features, rank)
    return TTShape(
        config.modes(in_features) or default.in_modes,
        config.modes(out_features) or default.out_modes,
        rank,
    )


@torch.no_grad()
def adapter_train(
    config: _LorettaConfig,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    up: bool = False,
    bias: bool = False,
    head: bool = False,
) -> TensorTrain:
    """A train as the config wants it: its shape, its gains and its start.

    Args:
        up: whether it is the second of an adapter, which leads to the layer's width and makes it start at zero.
        head: whether it is no adapter's, but a layer of a new head, which starts at random as in the paper.
    """
    shape = train_shape(config, in_features, out_features, rank)
    if config.core_gain == "rate":
        shape = with_gains(shape, up)
    as_base = config.init_weights is True and not head
    train = TensorTrain(shape, bias, zero=up and as_base, random_bias=config.init_weights is False and not head)
    if config.core_gain == "rate" and as_base:
        start_(train.cores, shape, up, zero=up)
    elif config.core_gain == "rate":  # W as drawn; only what each core has of it is another
        gains = stored_gains(shape, up)
        mean = math.prod(gains) ** (1 / len(gains))
        for core, gain in zip(train.cores.split(shape.core_sizes), gains, strict=True):
            core.mul_(mean / gain)
    return train
