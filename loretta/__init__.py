"""LoRETTA: fine-tuning with tensor-train adapters, as two methods of PEFT.

Importing this package registers ``LORETTA_ADP`` and ``LORETTA_REP`` with PEFT; adapters can be loaded afterwards.
"""

from peft import PeftModel, TaskType, get_peft_model
from peft.utils import register_peft_method

from .compress import compress_lora
from .config import LorettaAdpConfig, LorettaRepConfig
from .convert import convert_upstream
from .export import export_lora
from .model import LorettaAdpModel, LorettaRepModel

register_peft_method(name="loretta_adp", config_cls=LorettaAdpConfig, model_cls=LorettaAdpModel)
register_peft_method(name="loretta_rep", config_cls=LorettaRepConfig, model_cls=LorettaRepModel)

__all__ = [
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
