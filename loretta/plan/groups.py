"""Trainable parameters by group: what the paper's tables count, group by group."""

from __future__ import annotations

from torch import nn

from loretta.norms import is_feature_norm
from loretta.tensor_train import TensorTrain

GROUPS = ("cores", "dense adapters", "biases", "scalings", "base biases", "norms", "tensorised head", "head")


def count_groups(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of a model with an adapter, in the order of ``GROUPS``, empty groups left out."""
    counts = dict.fromkeys(GROUPS, 0)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                counts[_group(path, module, name)] += parameter.numel()
    return {group: count for group, count in counts.items() if count}


def _group(path: str, module: nn.Module, name: str) -> str:
    """The group of the parameter ``name`` of the module at ``path``."""
    if ".modules_to_save." in f".{path}.":
        if is_feature_norm(module):
            return "norms"
        return "tensorised head" if isinstance(module, TensorTrain) else "head"
    if "loretta_" not in f"{path}.{name}":
        return "base biases"
    if "scaling" in f"{path}.{name}":
        return "scalings"
    return {"cores": "cores", "bias": "biases"}.get(name, "dense adapters")
