"""The operators as Triton kernels: one launch forward, one backward, from the cores. The only folder that needs triton.

The plan (`plan`, `side`) is plain Python; the functions that launch are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    name: name[: -len("_fwd")] for name in ("tt_adapter_fwd", "tt_adapter_bwd", "tt_linear_fwd", "tt_linear_bwd")
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
