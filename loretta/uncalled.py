"""Modules that a model never calls: it reads their weights directly, so an adapter there would do nothing."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from .layer import LorettaLayer

# By the class of a module: the children whose weights it hands to a function of torch, or to a fused kernel wherever
# there is one (state-space mixers).
_READS_WEIGHTS_OF = {
    "MultiheadAttention": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "NemotronHMamba2Mixer"), ("out_proj",)),
    **dict.fromkeys(("GraniteMoeHybridMambaLayer", "Zamba2MambaMixer"), ("out_proj",)),
}
# torch's modules that in eval mode compute from their children's weights, and what each asks before it does so.
_FAST_PATHS = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))
_SAVED = "_loretta_{}"


def cannot_be_adapted(model: nn.Module) -> dict[str, str]:
    """The names of linears at which no adapter can work, each with the reason."""
    found = {}
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            for child in _READS_WEIGHTS_OF.get(kind.__name__, ()):
                found[f"{name}.{child}".lstrip(".")] = f"{kind.__name__} reads its weight and does not call it"
        if isinstance(module, nn.Linear) and "router" in type(module).__name__.lower():
            found[name] = f"a {type(module).__name__} returns more than one tensor"
    return found


def leave_fast_paths(model: nn.Module) -> None:
    """Have torch's encoder layers call their children where these hold an adapter or a module of modules_to_save."""
    for kind, switch in _FAST_PATHS:
        for module in model.modules():
            if isinstance(module, kind) and getattr(module, switch, False) and _holds_trained(module):
                setattr(module, _SAVED.format(switch), getattr(module, switch))
                setattr(module, switch, False)


def return_to_fast_paths(model: nn.Module) -> None:
    """Undo ``leave_fast_paths``."""
    for _, switch in _FAST_PATHS:
        for module in model.modules():
            if _SAVED.format(switch) in module.__dict__:
                setattr(module, switch, module.__dict__.pop(_SAVED.format(switch)))


def _holds_trained(module: nn.Module) -> bool:
    return any(isinstance(child, (LorettaLayer, AuxiliaryTrainingWrapper)) for child in module.modules())


class FirstStep:
    """A model's forward hook that warns, once, of adapted modules which its first training step did not call.

    It does nothing where a part of the model is compiled: the hooks would be traced.
    """

    def __init__(self, model: nn.Module) -> None:
        forget_first_step(model)
        self._hook = model.register_forward_pre_hook(self)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        self.remove()
        if any("_orig_mod" in module._modules or module._compiled_call_impl for module in model.modules()):
            return
        waiting = {module: name for name, module in model.named_modules() if _is_active(module)}
        count = len(waiting)
        hooks: list[RemovableHandle] = []

        def called(module: nn.Module, args: Any) -> None:
            waiting.pop(module, None)

        def warn(model: nn.Module, args: Any, output: Any) -> None:
            for hook in hooks:
                hook.remove()
            if waiting and output is not None:  # None: the forward has failed
                warnings.warn(
                    f"{len(waiting)} of {count} modules were adapted but not called in the first training step, such "
                    f"as {next(iter(waiting.values()))!r}: their adapters did nothing and get no gradient. Either this "
                    f"batch needs none of them, or the model reads their weights without calling them; name such "
                    f"modules in exclude_modules",
                    stacklevel=2,
                )

        hooks += [module.register_forward_pre_hook(called) for module in waiting]
        hooks.append(model.register_forward_hook(warn, always_call=True))


def _is_active(module: nn.Module) -> bool:
    return (
        isinstance(module, LorettaLayer)
        and not module.disable_adapters
        and any(module.has_adapter(name) for name in module.active_adapters)
    )


def forget_first_step(model: nn.Module) -> None:
    """Remove the hook of ``FirstStep``, if it still waits."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, FirstStep):
            hook.remove()
