"""Merging adapters into the base weights, and taking them out again so that the base has the bits that it had."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .quantised import copy_of_linear


class Merging(nn.Module, BaseTunerLayer):
    """What a layer with adapters needs to be merged: ``fold`` and ``has_adapter`` are the method's.

    While adapters are merged, a copy of the base linear with other weights is in its place (PEFT, TRL and others read
    ``base_layer.weight`` then), and the base linear itself is set aside: nothing that happens to the adapters in the
    meantime can change it. That takes the memory of one more weight.
    """

    base_layer: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self.unmerged: list[nn.Module] = []  # while merged: the base linear; in a list it is no submodule
        self.merged_state: tuple[tuple[int, int], ...] = ()

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base weight is stored as [in, out]."""
        return isinstance(self.get_base_layer(), Conv1D)

    @abstractmethod
    def has_adapter(self, adapter_name: str) -> bool:
        """Whether this layer holds an adapter of that name."""

    @abstractmethod
    def fold(
        self, weight: torch.Tensor, bias: torch.Tensor | None, adapter_names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [in, out] and bias [out] of the one linear that is the base linear with the named adapters.

        Args:
            weight, bias: the base linear's, [in, out] and [out], in fp32 or fp64; neither is changed in place.

        Raises:
            ValueError: with such an adapter it is no linear.
        """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a linear with the named (or the active) adapters in its weight in the place of the base linear.

        Raises:
            ValueError: an adapter is no linear map, or with ``safe_merge`` a merged weight is not finite; nothing is
                changed then.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if new:
            self._merge([*self.merged_adapters, *new], safe_merge)

    @torch.no_grad()
    def _merge(self, adapter_names: list[str], safe: bool = False) -> None:
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(f"adapters around another adapter ({type(self.base_layer).__name__}) cannot be merged")
        linear, backend, stored = self.unmerged_linear(), self.quantization_backend, self._stored_weight()
        base_weight, base_bias = self._wide(stored)
        weight, bias = self.fold(base_weight, base_bias, adapter_names)
        if safe and not all(tensor.isfinite().all() for tensor in (weight, bias) if tensor is not None):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )
        merged = (weight if self.fan_in_fan_out else weight.T).to(stored.dtype).contiguous()
        if bias is base_bias or (linear.bias is None and bias is not None and not bias.any()):
            bias = linear.bias
        elif bias is not None:
            bias = nn.Parameter(bias.to((stored if linear.bias is None else linear.bias).dtype), requires_grad=False)
        self.base_layer = copy_of_linear(linear, bias, merged if backend is None else None)
        if backend is not None:
            backend.set_base_weight(self, merged)
        self.unmerged = [linear]
        self.merged_adapters = [*adapter_names]
        self.merged_state = self._state(adapter_names)

    def unmerge(self) -> None:
        """Put the base linear back, the very module that merging set aside."""
        if self.unmerged:
            self.base_layer = self.unmerged_linear().train(self.training)
        self.unmerged, self.merged_adapters = [], []

    def unmerged_linear(self) -> Any:
        """The base linear without adapters, where the merged one is and in its dtype: the model may have been moved."""
        current: Any = self.get_base_layer()
        if not self.unmerged:
            return current
        linear, weight = self.unmerged[0], current.weight
        if linear.weight.device != weight.device:
            linear.to(weight.device)
        if self.quantization_backend is None and linear.weight.dtype != weight.dtype:
            linear.to(weight.dtype)
        return linear

    def base_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [in, out] and bias [out] of the base linear without adapters, dequantised, in fp32 or in fp64.

        Raises:
            TypeError: its kind of quantisation cannot be undone.
            ValueError: the layer is no linear, or its weight is computed from other parameters.
        """
        return self._wide(self._stored_weight())

    def _stored_weight(self) -> torch.Tensor:
        linear = self.unmerged_linear()
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(linear)
        if linear._parameters.get("weight") is None:
            raise ValueError(f"{linear} has no weight that is a parameter, so no adapter can be merged into it")
        weight: torch.Tensor = linear.weight.data
        return weight

    def _wide(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias, dtype = self.unmerged_linear().bias, torch.promote_types(weight.dtype, torch.float32)
        weight = (weight if self.fan_in_fan_out else weight.T).to(dtype)
        return weight, None if bias is None else bias.detach().to(dtype)

    def merge_changes(self) -> None:
        """Merge anew where weights of a merged adapter have changed since.

        Not in compiled graphs, which cannot ask, and not in the replicas of nn.DataParallel, which hold no parameters.
        """
        if torch.compiler.is_compiling() or getattr(self, "_is_replica", False):
            return
        if self._state(self.merged_adapters) != self.merged_state:
            self._merge(self.merged_adapters)

    def _state(self, adapter_names: list[str]) -> tuple[tuple[int, int], ...]:
        """What changes when the weights of the named adapters change in place or are replaced."""
        return tuple(
            (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for name in adapter_names
            for kind in self.adapter_layer_names
            if name in getattr(self, kind)
            for parameter in getattr(self, kind)[name].parameters()
        )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate the named adapters; merged ones are unmerged first where the choice changes."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if self.merged and list(names) != list(self.active_adapters):
            self.unmerge()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it is merged, all are unmerged first."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        super().delete_adapter(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Unmerge before weights are loaded that are merged, or merged into."""
        if self.merged:
            parts = [key.removeprefix(prefix).split(".") for key in state_dict if key.startswith(prefix)]
            if any(part[0] == "base_layer" or set(part[1:2]) & set(self.merged_adapters) for part in parts):
                self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)


def declare_biases(model: nn.Module, names: list[str]) -> None:
    """Record in a transformers model's configuration that linears have a bias which merging gave them.

    Where its architecture has a switch for them (Llama's ``mlp_bias``), it is set, and the other linears that it is for
    get a bias of zeros, so that the model can be saved and loaded. Elsewhere a warning says that it cannot.
    """
    if not isinstance(model, PreTrainedModel) or not names:
        return
    wanted = {f"{name}.bias" for name in names}
    switches: dict[str, bool] = {}
    found: set[str] = set()
    for switch in [name for name, value in model.config.to_dict().items() if value is False and "bias" in name]:
        gained = _state_names(model, {switch: True}) & wanted
        if gained - found:
            switches[switch] = True
            found |= gained
    if found != wanted:
        warnings.warn(
            f"merging gave a bias to {len(names)} linears that had none, such as {names[0]!r}, and the configuration "
            f"of {type(model).__name__} cannot say so: this model computes with them, but what transformers loads from "
            "its save_pretrained() would leave them out. To save the adapter, keep it as it is or use export_lora()",
            stacklevel=2,
        )
        return
    for key in _state_names(model, switches) - model.state_dict().keys():
        linear: Any = model.get_submodule(key.removesuffix(".bias"))
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
    for switch in switches:
        setattr(model.config, switch, True)


def _state_names(model: PreTrainedModel, changes: dict[str, bool]) -> set[str]:
    """The names of the parameters and buffers of such a model with a changed configuration."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return set(type(model)(config).state_dict())
