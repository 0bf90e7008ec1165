"""LoRETTA_adp: a bottleneck adapter whose two projections are tensor trains."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loretta_kernels import Groups, tt_adapter
from loretta_kernels.reference import ACTIVATIONS

from .config import LorettaAdpConfig, _LorettaConfig
from .layer import Acting, LorettaLayer, adapter_train, bond_rank, dropout_probability
from .stacked import Mixed, Trains
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
        self.loretta_adp_scaling = nn.ModuleDict()
        self.placement: dict[str, str] = {}
        self.activation: dict[str, str] = {}
        self.adapter_dropout = nn.ModuleDict()  # nn.Dropout: what TRL and others look for to switch dropout off
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
        self.adapter_dropout[adapter_name] = nn.Dropout(config.adapter_dropout)
        self.loretta_adp_down[adapter_name] = _projection(config, width_in, config.bottleneck_size, rank, up=False)
        self.loretta_adp_up[adapter_name] = _projection(config, config.bottleneck_size, width_out, rank, up=True)
        if config.scaling == "learned":
            self.loretta_adp_scaling[adapter_name] = Scale()
        else:
            self.scaling[adapter_name] = float(config.scaling)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def trains(self, adapter_name: str) -> Trains:
        """The two projections and the scaling.

        Raises:
            TypeError: they are dense.
        """
        down, up = self.loretta_adp_down[adapter_name], self.loretta_adp_up[adapter_name]
        if not isinstance(down, TensorTrain) or not isinstance(up, TensorTrain):
            raise TypeError(f"the projections of {adapter_name!r} are no tensor trains, but dense")
        return Trains(adapter_name, down.tt, up.tt, self.scale(adapter_name))

    def settings(self, adapter_name: str) -> tuple[Any, ...]:
        """The placement, the activation, dropout while training, and a scaling that is not learned."""
        dropout_p = self.training and dropout_probability(self.adapter_dropout[adapter_name], True)
        scaling = self.scaling.get(adapter_name, "learned")
        return self.placement[adapter_name], self.activation[adapter_name], dropout_p, scaling

    def adapted(self, x: torch.Tensor, acting: Acting, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer with the adapters at their placements."""
        result = self.base_layer(self._placed("mh_adapter", acting, x, x), *args, **kwargs)
        if acting and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        result = self._placed("output_adapter", acting, result, result)
        return self._placed("parallel_adapter", acting, result, x)

    def _placed(self, placement: str, acting: Acting, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual plus what the adapters of this placement make of x."""
        if isinstance(acting, Mixed):
            if self.placement[acting.trains.like] != placement:
                return residual
            return self._add_trains(acting.trains, x, residual, acting.groups).to(residual.dtype)
        here = [([name for name in names if self.placement[name] == placement], rows) for names, rows in acting]
        return self._on_rows(self._add_adapters, [group for group in here if group[0]], residual, x)

    def _add_adapters(self, adapter_names: list[str], residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for name in adapter_names:
            residual = self._add_adapter(name, x, residual)
        return residual

    def _add_trains(
        self, trains: Trains, x: torch.Tensor, residual: torch.Tensor, index: Groups | torch.Tensor | None = None
    ) -> torch.Tensor:
        name, down, up, scale = trains
        dropout_p = dropout_probability(self.adapter_dropout[name], self.training)
        return tt_adapter(
            x,
            down,
            up,
            activation=self.activation[name],
            scale=scale,
            residual=residual,
            dropout_p=dropout_p,
            index=index,
        )

    def _add_adapter(self, name: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        down, up = self.loretta_adp_down[name], self.loretta_adp_up[name]
        if isinstance(down, TensorTrain):
            return self._add_trains(self.trains(name), x, residual)
        scale = self.scale(name)
        dropout_p = dropout_probability(self.adapter_dropout[name], self.training)
        assert isinstance(down, nn.Linear)
        assert isinstance(up, nn.Linear)
        h = F.dropout(self._cast_input_dtype(x, down.weight.dtype), dropout_p)
        h = ACTIVATIONS[self.activation[name]](down(h))
        return residual + (scale * up(h)).to(residual.dtype)

    @torch.no_grad()
    def lora_factors(
        self, adapter_name: str, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a linear adapter adds to the layer's output, as ``x·A·B + c`` with the scaling in B and c.

        Args:
            weight, bias: of the linear that is adapted, [in, out] and [out]; without a weight both are the base's.

        Returns:
            A [in, k], B [k, out] and c [out], k at most the waist of the trains, in the weight's dtype.

        Raises:
            ValueError: the adapter has a nonlinearity.
        """
        if self.activation[adapter_name] != "identity":
            raise ValueError(MERGE_ERROR)
        if weight is None:
            weight, bias = self.base_parameters()
        scale = self.scale(adapter_name)
        down, down_bias = _linear(self.loretta_adp_down[adapter_name], weight.dtype)
        up, up_bias = _linear(self.loretta_adp_up[adapter_name], weight.dtype)
        chain = [*down, *up]
        cut = min(range(1, len(chain)), key=lambda k: len(chain[k]))
        a, b = reduce(torch.matmul, chain[:cut]), scale * reduce(torch.matmul, chain[cut:])
        c = scale * (reduce(torch.matmul, up, down_bias) + up_bias)
        if self.placement[adapter_name] == "mh_adapter":
            return a, b @ weight, c @ weight
        if self.placement[adapter_name] == "output_adapter":
            return weight @ a, b, c if bias is None else c + bias @ a @ b
        return a, b, c

    def fold(
        self, weight: torch.Tensor, bias: torch.Tensor | None, adapter_names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The adapters on the input folded in first, then those on the output, then those beside the linear."""
        for placement in ("mh_adapter", "output_adapter", "parallel_adapter"):
            placed = [name for name in adapter_names if self.placement[name] == placement]
            deltas = [self.lora_factors(name, weight, bias) for name in placed]
            for a, b, c in deltas:
                weight = weight + a @ b
                bias = c if bias is None else bias + c
        return weight, bias

    def scale(self, adapter_name: str) -> float | torch.Tensor:
        """The scaling: a number, or one element that is learned."""
        if adapter_name not in self.loretta_adp_scaling:
            return self.scaling[adapter_name]
        learned = self.loretta_adp_scaling[adapter_name]
        assert isinstance(learned, Scale)
        return learned.value


class Scale(nn.Module):
    """A learned scale, from 1: a module, since the name of a trained tensor has the adapter's in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))


MERGE_ERROR = (
    "LoRETTA_adp adapters cannot be merged: between their two projections there is a nonlinearity, so no weight of the "
    "base model can hold them. Keep the adapter, call unload() for the bare base model, or train LoRETTA_rep, or "
    "LoRETTA_adp with non_linearity='identity', instead."
)


def _linear(projection: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Matrices whose product is the projection's, [in, out], and its bias."""
    chain = projection.sides() if isinstance(projection, TensorTrain) else [projection.weight.T]
    return [matrix.to(dtype) for matrix in chain], projection.bias.to(dtype)


def _projection(config: LorettaAdpConfig, in_features: int, out_features: int, rank: int, up: bool) -> nn.Module:
    if config.tensorized:
        return adapter_train(config, in_features, out_features, rank, up=up, bias=True)
    linear = nn.Linear(in_features, out_features)
    if up and config.init_weights is True:
        nn.init.zeros_(linear.weight)
    else:
        nn.init.normal_(linear.weight, std=in_features**-0.5)
    if config.init_weights is False:
        nn.init.normal_(linear.bias, std=0.02)
    else:
        nn.init.zeros_(linear.bias)
    return linear
