"""LoRETTA_rep: a LoRA whose two factors are tensor trains."""

from __future__ import annotations

import warnings
from functools import reduce
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from loretta_kernels import Groups, tt_lora

from .config import LorettaRepConfig, _LorettaConfig
from .layer import Acting, LorettaLayer, adapter_train, bond_rank, dropout_probability
from .stacked import Mixed, Trains
from .tensor_train import TensorTrain


class LorettaRepLinear(LorettaLayer):
    """``y = base(x) + alpha/r · drop(x)·A·B`` with A [in, r] and B [r, out] as tensor trains.

    With ``enable_lora`` B has the columns of the enabled slices only, and the delta is added to those slices.
    """

    adapter_layer_names: tuple[str, ...] = ("loretta_rep_A", "loretta_rep_B")
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "scaling", "lora_dropout", "enable_lora", "merge_weights")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.loretta_rep_A = nn.ModuleDict()
        self.loretta_rep_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()  # nn.Dropout: what TRL and others look for to switch dropout off
        self.enable_lora: dict[str, list[bool] | None] = {}
        self.merge_weights: dict[str, bool] = {}

    def add_adapter(self, adapter_name: str, config: _LorettaConfig, key: str) -> None:
        """Create A and B.

        Raises:
            ValueError: enable_lora does not divide the output into equal slices.
        """
        assert isinstance(config, LorettaRepConfig)
        if config.fan_in_fan_out and not self.fan_in_fan_out:
            warnings.warn(f"fan_in_fan_out=True is ignored for {key!r}: its weight is [out, in]", stacklevel=2)
        out_features = self.out_features
        if config.enable_lora is not None:
            slices = len(config.enable_lora)
            if out_features % slices:
                raise ValueError(
                    f"enable_lora has {slices} slices, which do not divide the {out_features} outputs of {key!r}"
                )
            out_features = out_features // slices * sum(config.enable_lora)
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), key), config.lora_alpha)

        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.enable_lora[adapter_name] = config.enable_lora
        self.merge_weights[adapter_name] = config.merge_weights
        rank = bond_rank(config, key)
        self.loretta_rep_A[adapter_name] = adapter_train(config, self.in_features, r, rank, up=False)
        self.loretta_rep_B[adapter_name] = adapter_train(config, r, out_features, rank, up=True)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _train(self, factor: str, adapter_name: str) -> TensorTrain:
        train = getattr(self, f"loretta_rep_{factor}")[adapter_name]
        assert isinstance(train, TensorTrain)
        return train

    def trains(self, adapter_name: str) -> Trains:
        """A and B, and alpha / r."""
        a, b = self._train("A", adapter_name), self._train("B", adapter_name)
        return Trains(adapter_name, a.tt, b.tt, self.scaling[adapter_name])

    def settings(self, adapter_name: str) -> tuple[Any, ...]:
        """The scaling, dropout while training, and the enabled slices."""
        dropout_p = self.training and dropout_probability(self.lora_dropout[adapter_name], True)
        return self.scaling[adapter_name], dropout_p, tuple(self.enable_lora[adapter_name] or ())

    def scale(self, adapter_name: str) -> float:
        """alpha / r."""
        return self.scaling[adapter_name]

    def adapted(self, x: torch.Tensor, acting: Acting, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) plus the deltas of the adapters."""
        result = self.base_layer(x, *args, **kwargs)
        if acting and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if isinstance(acting, Mixed):
            return self._add_delta(acting.trains, result, x, acting.groups).to(result.dtype)
        return self._on_rows(self._add_deltas, acting, result, x)

    def _add_deltas(self, adapter_names: list[str], result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for name in adapter_names:
            result = self._add_delta(self.trains(name), result, x)
        return result

    def _add_delta(
        self, trains: Trains, result: torch.Tensor, x: torch.Tensor, index: Groups | torch.Tensor | None = None
    ) -> torch.Tensor:
        name, a, b, scale = trains
        dropout_p = dropout_probability(self.lora_dropout[name], self.training)
        columns = self._enabled_columns(name, x.device)
        if columns is None:
            return tt_lora(x, a, b, scale=scale, residual=result, dropout_p=dropout_p, index=index)
        delta = tt_lora(x, a, b, scale=scale, dropout_p=dropout_p, index=index)
        return result.index_add(-1, columns, delta.to(result.dtype))

    def _enabled_columns(self, adapter_name: str, device: torch.device | None = None) -> torch.Tensor | None:
        """The output columns that B writes, or None for all of them."""
        enabled = self.enable_lora[adapter_name]
        if enabled is None or all(enabled):
            return None
        columns = torch.arange(self.out_features, device=device).view(len(enabled), -1)
        return torch.cat([part for part, on in zip(columns, enabled, strict=True) if on])

    @torch.no_grad()
    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [in, r] and B [r, out], materialised in the cores' dtype, without the scaling."""
        a, b = self._train("A", adapter_name).matrix(), self._train("B", adapter_name).matrix()
        return a, self._all_columns(b, adapter_name)

    @torch.no_grad()
    def narrow_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [in, k] and B [k, out] of the same product, where k is the least of r and the waists of both trains."""
        chain = [*self._train("A", adapter_name).sides(), *self._train("B", adapter_name).sides()]
        cut = min((1, 2, 3), key=lambda position: len(chain[position]))
        a, b = reduce(torch.matmul, chain[:cut]), reduce(torch.matmul, chain[cut:])
        return a, self._all_columns(b, adapter_name)

    def _all_columns(self, b: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """B [k, out] from its enabled columns; the others are zero."""
        columns = self._enabled_columns(adapter_name, b.device)
        return b if columns is None else b.new_zeros(len(b), self.out_features).index_copy(1, columns, b)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the base weight, in that weight's layout."""
        a, b = self.factors(adapter)
        delta = (a @ b) * self.scaling[adapter]
        return delta if self.fan_in_fan_out else delta.T

    def fold(
        self, weight: torch.Tensor, bias: torch.Tensor | None, adapter_names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base weight [in, out] plus the delta of each named adapter, and the base bias."""
        for name in adapter_names:
            a, b = self.factors(name)
            weight = weight + self.scaling[name] * (a @ b).to(weight)
        return weight, bias

    def train(self, mode: bool = True) -> LorettaRepLinear:
        """Switch the mode; adapters with ``merge_weights`` are merged anew in eval mode and unmerged in training."""
        super().train(mode)
        merging = [name for name in self.active_adapters if self.merge_weights.get(name)]
        if merging and (mode or not self.disable_adapters):
            also = [name for name in self.merged_adapters if name not in merging]
            self.unmerge()
            if not mode:
                self.merge(adapter_names=[*also, *merging])
        return self

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the delta is A·B."""
        return True
