"""LoRETTA_rep as a plain LoRA checkpoint, for stock PEFT and everything that reads its format."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from .config import LorettaRepConfig
from .model import LorettaRepModel
from .rep import LorettaRepLinear
from .tensor_train import TensorTrain


def export_lora(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter of LoRETTA_rep as a LoRA checkpoint with the same logits.

    Each train is materialised: A [r, in], B [out, r]. Norms, heads (a tensor-train head as the dense layer it stands
    for) and trained biases are in the checkpoint too.

    Args:
        model: a model with a LoRETTA_rep adapter.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written; made if absent.
        adapter_name: which adapter.

    Raises:
        TypeError: the model has no LoRETTA_rep adapters.
        ValueError: it has no adapter of that name, or an adapter is merged.
    """
    if not isinstance(getattr(model, "base_model", None), LorettaRepModel):
        raise TypeError(
            f"export_lora takes a PeftModel with a LoRETTA_rep adapter, got {type(model).__name__}"
            + (f" around {type(model.base_model).__name__}" if isinstance(model, PeftModel) else "")
        )
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter called {adapter_name!r}, there are {sorted(model.peft_config)}")
    config = model.peft_config[adapter_name]
    assert isinstance(config, LorettaRepConfig)

    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    fan_in_fan_out = False
    for name, module in model.named_modules():
        if isinstance(module, LorettaRepLinear) and module.has_adapter(adapter_name):
            if module.merged:
                raise ValueError("an adapter is merged into the base weights: call unmerge_adapter() first")
            fan_in_fan_out |= module.fan_in_fan_out
            a, b = module.factors(adapter_name)
            del tensors[f"{name}.loretta_rep_A.cores"], tensors[f"{name}.loretta_rep_B.cores"]
            tensors[f"{name}.lora_A.weight"] = a.T
            tensors[f"{name}.lora_B.weight"] = b.T
        elif isinstance(module, TensorTrain) and f".modules_to_save.{adapter_name}." in name:
            saved = name.replace(f".modules_to_save.{adapter_name}.", ".")
            del tensors[f"{saved}.cores"]
            with torch.no_grad():
                tensors[f"{saved}.weight"] = module.matrix().T

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
    )
    lora_config(config, fan_in_fan_out).save_pretrained(str(folder))


def lora_config(config: LorettaRepConfig, fan_in_fan_out: bool) -> LoraConfig:
    """The config of the LoRA that an adapter with this (resolved) config is."""
    same = (
        "base_model_name_or_path revision task_type inference_mode r lora_alpha lora_dropout bias "
        "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern"
    )
    return LoraConfig(fan_in_fan_out=fan_in_fan_out, **{name: getattr(config, name) for name in same.split()})
