"""Paths on which a version of another library gives wrong results: they are refused with a sentence."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import transformers

# Before 5.18, load_adapter puts no weights into modules that an adapter saves whole, and does not say so.
LOAD_ADAPTER_DROPS_MODULES = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)


def check_modules_are_loaded(names: Sequence[str] | None) -> None:
    """Raise where transformers' own ``load_adapter`` would leave these modules as they are in the base.

    Raises:
        RuntimeError: called from a ``load_adapter`` that drops modules, and there are some.
    """
    if not names or not LOAD_ADAPTER_DROPS_MODULES:
        return
    frame = sys._getframe()
    while caller := frame.f_back:
        frame = caller
        if frame.f_code.co_name == "load_adapter" and frame.f_globals["__name__"] == "transformers.integrations.peft":
            raise RuntimeError(
                f"model.load_adapter of transformers {transformers.__version__} does not load {', '.join(names)}, "
                "which this adapter trained: load it with peft.PeftModel.from_pretrained(model, folder), or take "
                "transformers 5.18 or later"
            )
