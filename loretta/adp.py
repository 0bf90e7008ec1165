"""LoRETTA_adp: a bottleneck adapter whose two projections are tensor trains."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loretta_kernels import tt_adapter
from loretta_kernels.reference import ACTIVATIONS

from .config import LorettaAdpConfig, _LorettaConfig
from .layer import Groups, LorettaLayer, bond_rank, train_shape
from .tensor_train import TensorTrain


class LorettaAdpLinear(LorettaLayer):
    """``adapter(x) = scaling · (act(drop(x)·W_down + b_down)·W_up + b_up)`` at one linear of the base model.

    The placement of an adapter is "mh_adapter": ``base(x + adapter(x))``, "output_adapter": ``z + adapter(z)`` with
    ``z = base(x)``, or "parallel_adapter": ``base(x) + adapter(x)``. Several active adapters add up.
    """

    adapter_layer_names: tuple[str, ...] = ("loretta_adp_down", "loretta_adp_up", "loretta_adp_scaling")
    other_param_names: tuple[str, ...] = ("placement", "activation", "adapter_dropout", "scaling")

    def __init__(self, base_layer: nn.Module, width: int | None = None, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, width, **quantization_kwargs)
        self.loretta_adp_down = nn.ModuleDict()
        self.loretta_adp_up = nn.ModuleDict()
        self.loretta_adp_scaling = nn.ParameterDict()
        self.placement: dict[str, str] = {}
        self.activation: dict[str, str] = {}
        self.adapter_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}

    def add_adapter(
        self, adapter_name: str, config: _LorettaConfig, key: str, placement: str = "output_adapter"
    ) -> None:
        """Create the two projections and, where it is learned, the scaling."""
        assert isinstance(config, LorettaAdpConfig)
        rank = bond_rank(config, key)
        width_in = self.out_features if placement == "output_adapter" else self.in_features
        width_out = self.in_features if placement == "mh_adapter" else self.out_features

        self.placement[adapter_name] = placement
        self.activation[adapter_name] = config.activation
        self.adapter_dropout[adapter_name] = config.adapter_dropout
        self.loretta_adp_down[adapter_name] = _projection(config, width_in, config.bottleneck_size, rank)
        self.loretta_adp_up[adapter_name] = _projection(
            config, config.bottleneck_size, width_out, rank, zero=config.init_weights is True
        )
        if config.scaling == "learned":
            self.loretta_adp_scaling[adapter_name] = nn.Parameter(torch.ones(1))
        else:
            self.scaling[adapter_name] = float(config.scaling)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted(self, x: torch.Tensor, groups: Groups, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer with the adapters of each group at their placements."""
        result = self.base_layer(self._placed("mh_adapter", groups, x, x), *args, **kwargs)
        if groups and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        result = self._placed("output_adapter", groups, result, result)
        return self._placed("parallel_adapter", groups, result, x)

    def _placed(self, placement: str, groups: Groups, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual plus what the adapters of this placement make of x."""
        here = [([name for name in names if self.placement[name] == placement], rows) for names, rows in groups]
        return self._on_rows(self._add_adapters, [group for group in here if group[0]], residual, x)

    def _add_adapters(self, adapter_names: list[str], residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for name in adapter_names:
            residual = self._add_adapter(name, x, residual)
        return residual

    def _add_adapter(self, name: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        down, up = self.loretta_adp_down[name], self.loretta_adp_up[name]
        scale = self.loretta_adp_scaling[name] if name in self.loretta_adp_scaling else self.scaling[name]
        dropout_p = self.adapter_dropout[name] if self.training else 0.0
        if isinstance(down, TensorTrain) and isinstance(up, TensorTrain):
            return tt_adapter(
                x,
                down.cores,
                down.shape,
                down.bias,
                up.cores,
                up.shape,
                up.bias,
                activation=self.activation[name],
                scale=scale,
                residual=residual,
                dropout_p=dropout_p,
            )
        assert isinstance(down, nn.Linear)
        assert isinstance(up, nn.Linear)
        h = F.dropout(self._cast_input_dtype(x, down.weight.dtype), dropout_p)
        h = ACTIVATIONS[self.activation[name]](down(h))
        return residual + (scale * up(h)).to(residual.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises.

        Raises:
            ValueError: an adapter with a nonlinearity is no linear map, so no weight can hold it.
        """
        raise ValueError(MERGE_ERROR)

    def unmerge(self) -> None:
        """Nothing to do: this method's adapters are never merged."""


MERGE_ERROR = (
    "LoRETTA_adp adapters cannot be merged: between their two projections there is a nonlinearity, so no weight of the "
    "base model can hold them. Keep the adapter, call unload() for the bare base model, or train LoRETTA_rep instead."
)


def _projection(
    config: LorettaAdpConfig, in_features: int, out_features: int, rank: int, zero: bool = False
) -> nn.Module:
    random_bias = config.init_weights is False
    if config.tensorized:
        shape = train_shape(config, in_features, out_features, rank)
        return TensorTrain(shape, bias=True, zero=zero, random_bias=random_bias)
    linear = nn.Linear(in_features, out_features)
    if zero:
        nn.init.zeros_(linear.weight)
    else:
        nn.init.normal_(linear.weight, std=in_features**-0.5)
    if random_bias:
        nn.init.normal_(linear.bias, std=0.02)
    else:
        nn.init.zeros_(linear.bias)
    return linear
