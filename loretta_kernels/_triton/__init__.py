"""The operator as Triton kernels: one launch forward, one backward, from the cores. The only folder that needs triton.

The plan (`plan`, `side`) is plain Python; the functions that launch are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("forward", "backward"):
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.adapter"), name)
