"""LoRETTA_rep: a LoRA whose two factors are tensor trains."""

from __future__ import annotations

import warnings
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from loretta_kernels import tt_lora

from .config import LorettaRepConfig, _LorettaConfig
from .layer import LorettaLayer, train_shape
from .tensor_train import TensorTrain


class LorettaRepLinear(LorettaLayer):
    """``y = base(x) + alpha/r · drop(x)·A·B`` with A [in, r] and B [r, out] as tensor trains.

    With ``enable_lora`` B has the columns of the enabled slices only, and the delta is added to those slices.
    """

    adapter_layer_names: tuple[str, ...] = ("loretta_rep_A", "loretta_rep_B")
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "scaling", "lora_dropout", "enable_lora", "merge_weights")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.loretta_rep_A = nn.ModuleDict()
        self.loretta_rep_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
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
        self.lora_dropout[adapter_name] = config.lora_dropout
        self.enable_lora[adapter_name] = config.enable_lora
        self.merge_weights[adapter_name] = config.merge_weights
        rank = config.tensor_rank
        self.loretta_rep_A[adapter_name] = TensorTrain(train_shape(config, self.in_features, r, rank))
        self.loretta_rep_B[adapter_name] = TensorTrain(
            train_shape(config, r, out_features, rank), zero=config.init_weights is True
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _train(self, factor: str, adapter_name: str) -> TensorTrain:
        train = getattr(self, f"loretta_rep_{factor}")[adapter_name]
        assert isinstance(train, TensorTrain)
        return train

    def adapted(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) plus the delta of each named adapter."""
        result = self.base_layer(x, *args, **kwargs)
        if adapter_names and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in adapter_names:
            a, b = self._train("A", name), self._train("B", name)
            dropout_p = self.lora_dropout[name] if self.training else 0.0
            scale = self.scaling[name]
            columns = self._enabled_columns(name, x.device)
            if columns is None:
                result = tt_lora(
                    x, a.cores, a.shape, b.cores, b.shape, scale=scale, residual=result, dropout_p=dropout_p
                )
            else:
                delta = tt_lora(x, a.cores, a.shape, b.cores, b.shape, scale=scale, dropout_p=dropout_p)
                result = result.index_add(-1, columns, delta.to(result.dtype))
        return result

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
        chain = [*self._train("A", adapter_name).halves(), *self._train("B", adapter_name).halves()]
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

    def _add_to_base_weight(self, adapter_name: str, sign: int, safe: bool = False) -> None:
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter_name).to(weight.device)
        merged = weight.to(torch.promote_types(weight.dtype, delta.dtype)) + sign * delta
        if safe and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        self.set_base_weight(merged.to(weight.dtype).contiguous())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas of the named (or the active) adapters to the base weight.

        Raises:
            ValueError: ``safe_merge`` and a merged weight is not finite; the base weight is then unchanged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if self.has_adapter(name):
                self._add_to_base_weight(name, +1, safe=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract every merged delta from the base weight."""
        while self.merged_adapters:
            self._add_to_base_weight(self.merged_adapters.pop(), -1)

    def train(self, mode: bool = True) -> LorettaRepLinear:
        """Switch the mode; adapters with ``merge_weights`` are merged in eval mode and unmerged in training."""
        super().train(mode)
        merging = [name for name in self.active_adapters if self.merge_weights.get(name)]
        if merging and mode and self.merged:
            self.unmerge()
        elif merging and not mode and not self.disable_adapters:
            todo = [name for name in merging if name not in self.merged_adapters]
            if todo:
                self.merge(adapter_names=todo)
        return self

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the delta is A·B."""
        return True
