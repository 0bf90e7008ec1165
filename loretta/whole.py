"""Modules of which all parameters are trained (norms, heads, ``modules_to_save``): fp32 copies beside a 16-bit base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from loretta_kernels import Groups

from .norms import is_feature_norm
from .tensor_train import TensorTrain

NARROW = (torch.float16, torch.bfloat16)


class TrainedWhole(ModulesToSaveWrapper):
    """PEFT's wrapper around a module and its trained copies, whose dtype may be another than the module's.

    Inputs are cast to the copy's dtype and outputs to the module's, so that all other activations keep their dtype.
    RMSNorms of transformers take their input uncast: they multiply by their weight last, so that a copy that was not
    trained yet computes the same bits as the module.
    """

    takes_any_dtype: bool
    # Of a norm: its parameters stacked, [adapters, features] each, and which of them each row has; the module's for -1.
    served: tuple[dict[str, torch.Tensor], Groups] | None = None

    @classmethod
    def adopt(cls, wrapper: ModulesToSaveWrapper) -> None:
        """Change the class of one of PEFT's wrappers to this one."""
        wrapper.__class__ = cls
        assert isinstance(wrapper, cls)
        wrapper.takes_any_dtype = _multiplies_last(wrapper.original_module)

    def _get_name(self) -> str:
        return "ModulesToSaveWrapper"  # in printed models and PEFT's error messages

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if self.served is not None:
            return self._forward_stack(*self.served, *args, **kwargs)
        if not self.active_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        return self._forward_copy(self.active_adapters[0], *args, **kwargs)

    def _forward_wrapped_mixed_batch(self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        return self._forward_copy(active_adapter, x, *args, **kwargs)

    def _forward_copy(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        own = self.modules_to_save[adapter_name]
        return self._as_the_module(own, _dtype(own), *args, **kwargs)

    def _forward_stack(self, stack: dict[str, torch.Tensor], groups: Groups, x: torch.Tensor) -> torch.Tensor:
        index = groups.index.long().view(*groups.index.shape, *[1] * (x.dim() - groups.index.dim()))
        own = {  # parameters that broadcast with x, a row of them for each row of x
            name: torch.where(index < 0, base, stack[name][index[..., 0].clamp(min=0)])
            for name, base in self.original_module.named_parameters()
        }

        def norm(x: torch.Tensor) -> torch.Tensor:
            module = self.original_module
            if not isinstance(module, nn.LayerNorm):
                normed: torch.Tensor = functional_call(module, own, (x,))
                return normed
            normed = F.layer_norm(x, module.normalized_shape, eps=module.eps) * own["weight"]
            return normed + own["bias"] if "bias" in own else normed

        given: torch.Tensor = self._as_the_module(norm, own["weight"].dtype, x)
        return given

    def _as_the_module(self, own: Callable[..., Any], dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
        """What a copy of this dtype gives, for inputs and with outputs as of the module."""
        base_dtype = _dtype(self.original_module)
        if dtype == base_dtype or dtype is None or base_dtype is None:
            return own(*args, **kwargs)
        if not self.takes_any_dtype:
            args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        given = own(*args, **kwargs)
        return given if _autocast_widens(self.original_module) else _cast(given, base_dtype)

    def widen(self, adapter_name: str) -> None:
        """Hold an adapter's copy in fp32 where it is in sixteen bits."""
        if adapter_name in self.modules_to_save:
            _recast(self.modules_to_save[adapter_name], lambda _, x: torch.float32 if x.dtype in NARROW else x.dtype)

    def follow_base_dtype(self, adapter_name: str) -> None:
        """Hold an adapter's copy in the dtype of the module it is a copy of."""
        if adapter_name in self.modules_to_save:
            self._like_the_original(self.modules_to_save[adapter_name])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself, or to merge the active adapter's copy: dense and in the module's own dtype."""
        if not merge:
            return self.original_module
        module: nn.Module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if module is not self.original_module:
            for name, train in list(module.named_modules()):
                if isinstance(train, TensorTrain):
                    module.set_submodule(name, train.to_linear(train.cores.dtype))
            self._like_the_original(module)
        return module

    def _like_the_original(self, module: nn.Module) -> None:
        original = self.original_module
        dtypes = {name: tensor.dtype for name, tensor in [*original.named_parameters(), *original.named_buffers()]}
        default = _dtype(original)  # of the parameters of tensor trains
        _recast(module, lambda name, x: dtypes.get(name) or default or x.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None:
        """Move a copy that was just loaded; PEFT calls this by name on whatever has it."""
        if adapter_name not in self.modules_to_save:
            return
        own, base = self.modules_to_save[adapter_name], next(self.original_module.parameters(), None)
        if base is not None and not any(parameter.is_meta for parameter in own.parameters()):
            own.to(base.device)


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a module computes: its first floating-point parameter's."""
    for parameter in module._parameters.values():  # parameters() would take as long as a norm does
        if parameter is not None and parameter.is_floating_point():
            return parameter.dtype
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def _multiplies_last(module: nn.Module) -> bool:
    """Whether this is an RMSNorm of transformers, which multiplies by its weight last and takes input of any dtype."""
    return (
        type(module).__module__.startswith("transformers.")
        and not isinstance(module, nn.LayerNorm)
        and is_feature_norm(module)
    )


def _autocast_widens(module: nn.Module) -> bool:
    """Whether autocast makes a module's output fp32: a LayerNorm's, on devices other than CPUs."""
    if not isinstance(module, nn.LayerNorm) or module.weight.device.type == "cpu":
        return False
    return torch.is_autocast_enabled(module.weight.device.type)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors among nested values in that dtype."""
    if isinstance(values, torch.Tensor):  # quicker than as a tree
        return values.to(dtype) if values.is_floating_point() else values
    return tree_map_only(torch.Tensor, lambda x: _cast(x, dtype), values)


def _recast(module: nn.Module, dtype: Callable[[str, torch.Tensor], torch.dtype]) -> None:
    """Give each floating-point parameter and buffer the dtype for its name and itself."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # tied ones stay tied
    for prefix, owner in module.named_modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                wanted = dtype(f"{prefix}.{name}".removeprefix("."), tensor)
                if tensor.dtype is wanted:
                    continue
                if tensor not in made:
                    # a new one, as PEFT makes: setting .data would leave the local part of a DTensor as it is
                    made[tensor] = tensor.detach().to(wanted)
                    if isinstance(tensor, nn.Parameter):
                        made[tensor] = nn.Parameter(made[tensor], requires_grad=tensor.requires_grad)
                tensors[name] = made[tensor]
