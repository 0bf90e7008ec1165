"""Which modules of a model are normalisations over features, and the shortest names that select just these."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

_OTHER_NORMS = ("batchnorm", "groupnorm", "instancenorm")


def is_feature_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their kin, by class: attribute names differ ("norm" would miss GPT-2's ln_1, ln_f)."""
    kind = type(module).__name__.lower()
    parameters = list(module.parameters(recurse=False))
    return (
        "norm" in kind
        and not any(other in kind for other in _OTHER_NORMS)
        and not list(module.children())
        and bool(parameters)
        and all(parameter.dim() == 1 for parameter in parameters)
    )


def norm_names(model: nn.Module, modules_to_save: Sequence[str] | None) -> list[str]:
    """Names for ``modules_to_save`` that select every norm with weights, except those inside modules saved whole.

    Norms that an earlier adapter already wraps are found too. A name is the shortest end of a module's full name that
    selects norms only, since PEFT compares by ``endswith``.
    """
    keys, norms = [], []
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if inside and key.startswith(inside):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            inside += (key + ".",)
            module = module.original_module
        keys.append(key)
        if is_feature_norm(module) and not _is_saved_whole(key, modules_to_save or ()):
            norms.append(key)

    wanted = set(norms)
    names: dict[str, None] = {}
    for key in norms:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        if not any(end in names for end in ends):
            names[next((end for end in ends if all(k in wanted for k in keys if k.endswith(end))), key)] = None
    return list(names)


def _is_saved_whole(key: str, modules_to_save: Sequence[str]) -> bool:
    """Whether the module is, or lies inside, one of those named; what PEFT does not adapt."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in modules_to_save)
