"""What an adapter's targets select: modules at which it would do nothing are refused, those left out are named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from typing import Any

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from .block import NAME
from .config import LorettaAdpConfig, _LorettaConfig
from .layer import LorettaLayer
from .targets import FAMILIES
from .uncalled import cannot_be_adapted


def is_all_linear(target_modules: Any) -> bool:
    """Whether these targets are PEFT's shorthand for every linear."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def also_excluding(exclude_modules: Any, names: Collection[str]) -> Any:
    """``exclude_modules``, names or a regex, with further names."""
    if not names:
        return exclude_modules
    if isinstance(exclude_modules, str):
        own = "|".join(name.replace(".", r"\.") for name in names)
        return rf"(?:{exclude_modules})|(?:.*\.)?(?:{own})"
    return {*(exclude_modules or ()), *names}


def check_targets(model: nn.Module, config: _LorettaConfig, is_target: Callable[[str], Any]) -> None:
    """Refuse targets at which an adapter would do nothing; where all linears are the target, leave them out.

    Args:
        model: the base model.
        config: its ``exclude_modules`` may change.
        is_target: whether the config targets the module of a name.

    Raises:
        ValueError: a target is such a module. A trained adapter that has one can be loaded, with a warning.
    """
    unfit = cannot_be_adapted(model)
    if is_all_linear(config.target_modules):
        config.exclude_modules = also_excluding(config.exclude_modules, unfit)
    elif targets := [name for name in unfit if is_target(name)]:
        ends = sorted({".".join(name.split(".")[-2:]) for name in targets})
        message = (
            f"no adapter can act at {targets[0]!r}: {unfit[targets[0]]}. Leave it out of target_modules, or "
            f"name all {len(targets)} such modules in exclude_modules: {ends}"
        )
        if not config.inference_mode:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def warn_of_unused_ranks(model: nn.Module, adapter_name: str, config: _LorettaConfig) -> None:
    """Name the keys of ``tensor_rank_pattern`` that select none of the adapted modules, as PEFT does for its own."""
    adapted = _adapted(model, adapter_name)
    unused = [
        pattern
        for pattern in config.tensor_rank_pattern
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted)
    ]
    if unused:
        warnings.warn(
            f"tensor_rank_pattern: {unused} did not match any targeted module and were ignored",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_of_what_is_left_out(model: nn.Module, adapter_name: str, config: _LorettaConfig, given: Any) -> None:
    """Warn of what "all-linear", or a default of LoRETTA_adp, leaves out: experts, or the whole feed-forward block.

    Args:
        model: with the adapter in it.
        given: ``target_modules`` as the user gave them.
    """
    left = [f"{name!r}, whose experts are parameters, not linears" for name in _experts_left_out(model, adapter_name)]
    if is_all_linear(given):
        left += [f"{name!r}: {reason}" for name, reason in cannot_be_adapted(model).items()]
        if left:
            warnings.warn(f"all-linear leaves {len(left)} modules out, such as {left[0]}", stacklevel=2)
    elif given is None and isinstance(config, LorettaAdpConfig):
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        family = FAMILIES.get(model_type)
        if left or (family and not family.before and not family.after):
            warnings.warn(
                f"the default targets of {model_type!r} leave the feed-forward out"
                f"{f' in part: {left[0]}' if left else ''}; name its modules in target_modules",
                stacklevel=2,
            )


def _experts_left_out(model: nn.Module, adapter_name: str) -> list[str]:
    """The names of modules that hold experts as parameters, which are no linears, and are in no adapted block."""
    adapted = tuple(f"{name}." for name in _adapted(model, adapter_name))
    return [
        name
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower()
        and not isinstance(module, nn.Linear)
        and any(weight.dim() > 1 for weight in module.parameters(recurse=False))
        and not f"{name}.".startswith(adapted)
    ]


def _adapted(model: nn.Module, adapter_name: str) -> list[str]:
    """The names of the linears and blocks that have the adapter."""
    return [
        name.removesuffix(f".{NAME}")
        for name, module in model.named_modules()
        if isinstance(module, LorettaLayer) and module.has_adapter(adapter_name)
    ]
