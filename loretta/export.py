"""LoRETTA_rep as a plain LoRA checkpoint, for stock PEFT and for servers that read its format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from ._validation import require_choice
from .config import LorettaRepConfig
from .model import LorettaRepModel
from .rep import LorettaRepLinear
from .servers import SERVERS, check_servable
from .tensor_train import TensorTrain

PREFIX = "base_model.model."
EXPORT_TARGETS = ("peft", *SERVERS)


def export_lora(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default", target: str = "peft"
) -> None:
    """Write an adapter of LoRETTA_rep as a LoRA checkpoint with the same logits.

    For ``"peft"`` each train is materialised, A [r, in] and B [out, r], with the adapter's own ``r``, ``lora_alpha``
    and patterns. Norms, heads (a tensor-train head as the dense layer it stands for) and trained biases are in the
    checkpoint too.

    Servers read one ``r`` and one ``lora_alpha``. For them the product of both trains is cut where it is narrowest,
    every module has the rank of the widest cut (the rest is zero), its scaling is in B, and ``lora_alpha = r``. PEFT
    loads these as well.

    Args:
        model: a model with a LoRETTA_rep adapter.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written; made if absent.
        adapter_name: which adapter.
        target: who reads it: one of "peft", "vllm", "sglang" and "llama.cpp" (whose converter reads the folder).

    Raises:
        TypeError: the model has no LoRETTA_rep adapters.
        ValueError: it has no adapter of that name, an adapter is merged, or the target would ignore or misread a part
            of the adapter; the message says what to do instead.
    """
    require_choice("target", target, EXPORT_TARGETS)
    if not isinstance(getattr(model, "base_model", None), LorettaRepModel):
        raise TypeError(
            f"export_lora takes a PeftModel with a LoRETTA_rep adapter, got {type(model).__name__}"
            + (f" around {type(model.base_model).__name__}" if isinstance(model, PeftModel) else "")
        )
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter called {adapter_name!r}, there are {sorted(model.peft_config)}")
    config = model.peft_config[adapter_name]
    assert isinstance(config, LorettaRepConfig)
    layers = _adapted(model, adapter_name)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("an adapter is merged into the base weights: call unmerge_adapter() first")

    lora = lora_config(config, any(layer.fan_in_fan_out for layer in layers.values()))
    factors = list(lora_factors(model, adapter_name, narrow=target in SERVERS))
    if target in SERVERS:
        rank = max(a.shape[1] for _, a, _, _ in factors)
        check_servable(target, model.get_base_model(), config, layers, rank)
        lora.r = lora.lora_alpha = rank
        lora.rank_pattern, lora.alpha_pattern = {}, {}
        if isinstance(lora.target_modules, str):  # a regex: SGLang takes lists only
            lora.target_modules = sorted(layers)
        tensors = {}
        factors = [
            (name, pad(a, (0, rank - a.shape[1])), pad(scale * b, (0, 0, 0, rank - len(b))), 1.0)
            for name, a, b, scale in factors
        ]
    else:
        tensors = _saved_whole(model, adapter_name)
    for name, a, b, _ in factors:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.T

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    lora.save_pretrained(str(folder))


def lora_factors(
    model: PeftModel, adapter_name: str, narrow: bool = False
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Of each adapted linear: its name in the base model, A [in, k], B [k, out] and the scale of A·B.

    Args:
        narrow: with the smallest k that the trains' shapes allow, instead of r.
    """
    for name, layer in _adapted(model, adapter_name).items():
        a, b = (layer.narrow_factors if narrow else layer.factors)(adapter_name)
        yield name, a, b, layer.scaling[adapter_name]


def _adapted(model: PeftModel, adapter_name: str) -> dict[str, LorettaRepLinear]:
    """The layers that hold the adapter, by their names in the base model."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LorettaRepLinear) and module.has_adapter(adapter_name)
    }


@torch.no_grad()
def _saved_whole(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter saves beside its trains, under PEFT's keys: norms, biases, and heads with dense layers."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key: tensor for key, tensor in saved.items() if model.base_model.prefix not in key}
    for name, module in model.named_modules():
        if isinstance(module, TensorTrain) and f".modules_to_save.{adapter_name}." in name:
            name = name.replace(f".modules_to_save.{adapter_name}.", ".")
            del tensors[f"{name}.cores"]
            tensors[f"{name}.weight"] = module.matrix().T
    return tensors


def lora_config(config: LorettaRepConfig, fan_in_fan_out: bool) -> LoraConfig:
    """The config of the LoRA that an adapter with this (resolved) config is."""
    same = (
        "base_model_name_or_path revision task_type inference_mode r lora_alpha lora_dropout bias "
        "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern"
    )
    return LoraConfig(fan_in_fan_out=fan_in_fan_out, **{name: getattr(config, name) for name in same.split()})
