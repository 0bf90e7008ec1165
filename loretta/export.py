"""LoRETTA adapters as plain LoRA checkpoints, for stock PEFT and everything that reads its format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from .adp import LorettaAdpLinear
from .config import LorettaAdpConfig, LorettaRepConfig
from .layer import LorettaLayer
from .model import LorettaAdpModel, LorettaRepModel
from .rep import LorettaRepLinear
from .tensor_train import TensorTrain


def export_lora(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write a LoRETTA_rep adapter, or a linear LoRETTA_adp adapter, as a LoRA checkpoint with the same logits.

    Each train is materialised: A [r, in], B [out, r]. Norms, heads (a tensor-train head as the dense layer it stands
    for) and trained biases are in the checkpoint too. For LoRETTA_adp with ``non_linearity="identity"`` r is the waist
    of the trains, or the bottleneck where that is narrower; the scaling is in B, and what its biases add to the output
    is the bias of B (``lora_bias``).

    Args:
        model: a model with such an adapter.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written; made if absent.
        adapter_name: which adapter.

    Raises:
        TypeError: the model has no LoRETTA adapters, or adapters with a nonlinearity.
        ValueError: it has no adapter of that name, or an adapter is merged.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, (LorettaRepModel, LorettaAdpModel)):
        raise TypeError(f"export_lora takes a PeftModel with a LoRETTA adapter, got {_kind(model)}")
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter called {adapter_name!r}, there are {sorted(model.peft_config)}")
    config = model.peft_config[adapter_name]
    assert isinstance(config, (LorettaAdpConfig, LorettaRepConfig))
    if isinstance(config, LorettaAdpConfig) and config.activation != "identity":
        raise TypeError(
            f"a LoRA is linear: export_lora takes LoRETTA_rep adapters, and LoRETTA_adp ones with "
            f"non_linearity='identity', got {_kind(model)} with {config.non_linearity!r}"
        )

    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    fan_in_fan_out = False
    factors: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LorettaLayer) and module.has_adapter(adapter_name):
            if module.merged:
                raise ValueError("an adapter is merged into the base weights: call unmerge_adapter() first")
            fan_in_fan_out |= module.fan_in_fan_out
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.loretta_")}
            if isinstance(module, LorettaAdpLinear):
                factors[name] = module.lora_factors(adapter_name)
            elif isinstance(module, LorettaRepLinear):
                factors[name] = (*module.factors(adapter_name), None)
        elif isinstance(module, TensorTrain) and f".modules_to_save.{adapter_name}." in name:
            saved = name.replace(f".modules_to_save.{adapter_name}.", ".")
            del tensors[f"{saved}.cores"]
            with torch.no_grad():
                tensors[f"{saved}.weight"] = module.matrix().T

    rank = max(a.shape[1] for a, _, _ in factors.values())
    has_bias = any(c is not None and c.any() for _, _, c in factors.values())
    for name, (a, b, c) in factors.items():
        if isinstance(config, LorettaAdpConfig):  # one rank for all layers
            missing = rank - a.shape[1]
            a, b = pad(a, (0, missing)), pad(b, (0, 0, 0, missing))
        tensors[f"{name}.lora_A.weight"] = a.T
        tensors[f"{name}.lora_B.weight"] = b.T
        if has_bias and c is not None:
            tensors[f"{name}.lora_B.bias"] = c
    lora = lora_config(config, fan_in_fan_out, rank, has_bias)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
    )
    lora.save_pretrained(str(folder))


def lora_config(
    config: LorettaAdpConfig | LorettaRepConfig, fan_in_fan_out: bool, rank: int, has_bias: bool
) -> LoraConfig:
    """The config of the LoRA that an adapter with this (resolved) config is; of rank ``rank`` for LoRETTA_adp."""
    same = (
        "base_model_name_or_path revision task_type inference_mode target_modules exclude_modules modules_to_save "
        "layers_to_transform layers_pattern"
    )
    fields: dict[str, Any] = {name: getattr(config, name) for name in same.split()}
    if isinstance(config, LorettaRepConfig):
        own = "r lora_alpha lora_dropout bias rank_pattern alpha_pattern"
        fields |= {name: getattr(config, name) for name in own.split()}
    else:
        bias = "lora_only" if config.bias == "adapter_only" else config.bias
        fields |= {"r": rank, "lora_alpha": rank, "lora_dropout": config.adapter_dropout, "bias": bias}
        fields["lora_bias"] = has_bias
    return LoraConfig(fan_in_fan_out=fan_in_fan_out, **fields)


def _kind(model: object) -> str:
    """What a model is, by its class and that of the tuner in it."""
    inside = f" around {type(model.base_model).__name__}" if isinstance(model, PeftModel) else ""
    return f"{type(model).__name__}{inside}"
