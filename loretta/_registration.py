"""Registers the two methods with PEFT once PEFT is imported, by whomever, and does not import it before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_peft() -> None:
    """Register now if PEFT is imported already, else at the end of the import that brings it."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Registering())


def _register() -> None:
    from peft.utils import register_peft_method

    from .config import LorettaAdpConfig, LorettaRepConfig
    from .model import LorettaAdpModel, LorettaRepModel

    register_peft_method(name="loretta_adp", config_cls=LorettaAdpConfig, model_cls=LorettaAdpModel)
    register_peft_method(name="loretta_rep", config_cls=LorettaRepConfig, model_cls=LorettaRepModel)


class _Registering:
    """A finder on `sys.meta_path` that watches the imports of PEFT and of this package's own modules.

    One of our modules may be what imports PEFT first. The registration needs that module fully imported, so it waits
    for the outermost import to end.
    """

    def __init__(self) -> None:
        self._depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft" and not name.startswith("loretta."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _load(self, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        self._depth += 1
        try:
            load(module)
        finally:
            self._depth -= 1
        if self._depth == 0 and "peft" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()
