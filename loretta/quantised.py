"""What a quantised base needs beside PEFT's backends: gradients must pass it, and using it must not change it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

_PACKS_ITSELF = "support_avx512bf16_for_cpu"  # bitsandbytes' flag of a 4-bit layer, from 0.49 on


def keep_unpacked(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes in the layout that they were loaded in; others are left alone.

    On a CPU with AVX512-BF16, such a layer repacks its weight for inference at its first forward in eval mode that
    needs no gradient. From then on no gradient passes it, and the ``state_dict()`` of a later save rounds the weight
    that is in memory. Wrapping a model calls this; call it yourself where a model is evaluated before it is wrapped.

    Raises:
        ValueError: layers are repacked already, which cannot be undone without rounding.
    """
    packed = []
    for name, module in model.named_modules():
        if hasattr(module, _PACKS_ITSELF):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                packed.append(name)
            setattr(module, _PACKS_ITSELF, False)
    if packed:
        raise ValueError(
            f"bitsandbytes has repacked {len(packed)} 4-bit layers for inference on this CPU, such as {packed[0]!r}, "
            f"as the model was evaluated before it was wrapped: no gradient passes them, and saving would round them. "
            f"Load the model again, and wrap it, or call loretta.quantised.keep_unpacked(model), before its first "
            f"forward"
        )


def copy_of_linear(linear: Any, bias: nn.Parameter | None, weight: Tensor | None) -> Any:
    """A copy of a linear, quantised or not, with another bias, and another weight where one is given.

    Hooks are shared, not copied: accelerate's holds the offloaded weights of the whole model, others collect state.
    """
    hooks = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values(), getattr(linear, "_hf_hook", None)]
    replaced: dict[int, Any] = {id(hook): hook for hook in hooks}
    if linear.bias is not None:
        replaced[id(linear.bias)] = bias
    if weight is not None:
        replaced[id(linear.weight)] = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    new = copy.deepcopy(linear, replaced)
    new.bias = bias
    if getattr(new.weight, "module", None) is linear:
        new.weight.module = new  # bitsandbytes' 4-bit weights write their state to it
    return new


def check_gradients_pass(model: nn.Module) -> None:
    """Raise where a quantised layer rounds its input: the gradient of a rounding is zero or none at all.

    Raises:
        ValueError: the base has such layers, so that most adapters would silently not be trained.
    """
    rounding = [name for name, module in model.named_modules() if _rounds_its_input(module)]
    if rounding:
        raise ValueError(
            f"{len(rounding)} layers of the base, such as {rounding[0]!r}, quantise their inputs, so that no gradient "
            f"passes them and most adapters would not be trained. Train on a base whose weights alone are quantised "
            f"(bitsandbytes' 8-bit or 4-bit, torchao's Int8WeightOnlyConfig or IntxWeightOnlyConfig); a trained "
            f"adapter can be loaded on this one for inference"
        )


def check_can_be_trained_whole(model: nn.Module, names: Collection[str]) -> None:
    """Raise where a module to save, such as a new head, is quantised: PEFT trains a copy of it, which must be dense.

    Raises:
        ValueError: a module that a name of ``names`` selects holds quantised weights.
    """
    for key, module in model.named_modules():
        if key.endswith(tuple(names)) and any(_is_quantised(parameter) for parameter in module.parameters()):
            raise ValueError(
                f"module {key!r} is to be trained whole, but the base was loaded with it quantised; leave it out of "
                f"the quantisation, as by BitsAndBytesConfig(llm_int8_skip_modules=[{key.split('.')[-1]!r}])"
            )


def _is_quantised(parameter: nn.Parameter) -> bool:
    """Integers, or torchao's tensors, which pass for floating-point ones."""
    return not parameter.is_floating_point() or hasattr(parameter, "qdata")


def _rounds_its_input(module: nn.Module) -> bool:
    """Whether a layer's activations are quantised too: torchao's kinds, and torch's own dynamic modules."""
    if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
        return True
    weight: Any = module._parameters.get("weight")
    return (
        getattr(weight, "act_quant_kwargs", None) is not None
        or getattr(weight, "activation_quantization", None) is not None
        or type(weight).__name__ == "LinearActivationQuantizedTensor"  # torchao before 0.18
    )
