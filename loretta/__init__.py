"""LoRETTA: fine-tuning with tensor-train adapters, as two methods of PEFT.

Importing this package registers ``LORETTA_ADP`` and ``LORETTA_REP`` with PEFT; adapters can be loaded afterwards.
PEFT itself is imported when it, or a name below, is first used: that takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register_with_peft

if TYPE_CHECKING:
    from peft import PeftModel, TaskType, get_peft_model

    from .compress import compress_lora
    from .config import LorettaAdpConfig, LorettaRepConfig
    from .convert import convert_upstream
    from .export import export_lora
    from .grouped import AdapterStack
    from .model import LorettaAdpModel, LorettaRepModel
    from .store import AdapterStore

__all__ = [
    "AdapterStack",
    "AdapterStore",
    "LorettaAdpConfig",
    "LorettaAdpModel",
    "LorettaRepConfig",
    "LorettaRepModel",
    "PeftModel",
    "TaskType",
    "compress_lora",
    "convert_upstream",
    "export_lora",
    "get_peft_model",
]
_MODULES = {
    "AdapterStore": "loretta.store",
    "AdapterStack": "loretta.grouped",
    "LorettaAdpConfig": "loretta.config",
    "LorettaAdpModel": "loretta.model",
    "LorettaRepConfig": "loretta.config",
    "LorettaRepModel": "loretta.model",
    "compress_lora": "loretta.compress",
    "convert_upstream": "loretta.convert",
    "export_lora": "loretta.export",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES.get(name, "peft")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
