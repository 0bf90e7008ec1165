"""LoRETTA adapters as plain LoRA checkpoints, for stock PEFT and for servers that read its format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from ._validation import require_choice
from .adp import LorettaAdpLinear
from .config import LorettaAdpConfig, LorettaRepConfig
from .layer import LorettaLayer
from .model import LorettaAdpModel, LorettaRepModel
from .rep import LorettaRepLinear
from .servers import SERVERS, check_servable
from .tensor_train import TensorTrain

PREFIX = "base_model.model."
EXPORT_TARGETS = ("peft", *SERVERS)


class _Factors(NamedTuple):
    """What an adapter adds to a linear's output: ``scale · x·A·B + bias``."""

    a: Tensor
    b: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    def of_rank(self, rank: int) -> _Factors:
        """The same with zeros up to a rank, and the scale in B."""
        missing = rank - self.a.shape[1]
        return self._replace(a=pad(self.a, (0, missing)), b=pad(self.scale * self.b, (0, 0, 0, missing)), scale=1.0)


def export_lora(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default", target: str = "peft"
) -> None:
    """Write a LoRETTA_rep adapter, or a linear LoRETTA_adp adapter, as a LoRA checkpoint with the same logits.

    For ``"peft"`` each train of LoRETTA_rep is materialised, A [r, in] and B [out, r], with the adapter's own ``r``,
    ``lora_alpha`` and patterns. Norms, heads (a tensor-train head as the dense layer it stands for) and trained biases
    are in the checkpoint too. For LoRETTA_adp with ``non_linearity="identity"`` r is the waist of the trains, or the
    bottleneck where that is narrower; the scaling is in B, and what its biases add to the output is the bias of B
    (``lora_bias``).

    Servers read one ``r`` and one ``lora_alpha``. For them the product of both trains is cut where it is narrowest,
    every module has the rank of the widest cut (the rest is zero), its scaling is in B, and ``lora_alpha = r``. PEFT
    loads these as well.

    Args:
        model: a model with such an adapter.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written; made if absent.
        adapter_name: which adapter.
        target: who reads it: one of "peft", "vllm", "sglang" and "llama.cpp" (whose converter reads the folder).

    Raises:
        TypeError: the model has no LoRETTA adapters, or adapters with a nonlinearity.
        ValueError: it has no adapter of that name, an adapter is merged, or the target would ignore or misread a part
            of the adapter; the message says what to do instead.

    Example:
        >>> tuned = get_peft_model(model, LorettaRepConfig(task_type="CAUSAL_LM"))
        >>> export_lora(tuned, "runs/exported")
    """
    require_choice("target", target, EXPORT_TARGETS)
    config = _exportable(model, adapter_name)
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LorettaLayer) and module.has_adapter(adapter_name)
    }
    if any(layer.merged for layer in layers.values()):
        raise ValueError("an adapter is merged into the base weights: call unmerge_adapter() first")
    factors = {name: _factors(layer, adapter_name, target in SERVERS) for name, layer in layers.items()}
    rank = max(a.shape[1] for a, _, _, _ in factors.values())
    has_bias = any(bias is not None and bool(bias.any()) for _, _, _, bias in factors.values())
    lora = lora_config(config, any(layer.fan_in_fan_out for layer in layers.values()))
    if target in SERVERS:
        check_servable(target, model.get_base_model(), config, layers, rank, has_bias)
        lora.rank_pattern, lora.alpha_pattern = {}, {}
        if isinstance(lora.target_modules, str):  # a regex: SGLang takes lists only
            lora.target_modules = sorted(layers)
    if target in SERVERS or isinstance(config, LorettaAdpConfig):
        lora.r = lora.lora_alpha = rank
        lora.lora_bias = has_bias
        factors = {name: found.of_rank(rank) for name, found in factors.items()}

    tensors = {} if target in SERVERS else _saved_whole(model, adapter_name)
    for name, (a, b, _, bias) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.T
        if has_bias and bias is not None:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = bias
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    lora.save_pretrained(str(folder))


def lora_config(config: LorettaAdpConfig | LorettaRepConfig, fan_in_fan_out: bool) -> LoraConfig:
    """The config of the LoRA that an adapter with this (resolved) config is; r is the caller's for LoRETTA_adp."""
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
        fields |= {"lora_dropout": config.adapter_dropout, "bias": bias}
    return LoraConfig(fan_in_fan_out=fan_in_fan_out, **fields)


def _exportable(model: object, adapter_name: str) -> LorettaAdpConfig | LorettaRepConfig:
    """The adapter's config, of a model that has such an adapter and one that is linear."""
    tuner = getattr(model, "base_model", None)
    kind = type(model).__name__ + (f" around {type(tuner).__name__}" if isinstance(model, PeftModel) else "")
    if not isinstance(model, PeftModel) or not isinstance(tuner, (LorettaRepModel, LorettaAdpModel)):
        raise TypeError(f"export_lora takes a PeftModel with a LoRETTA adapter, got {kind}")
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter called {adapter_name!r}, there are {sorted(model.peft_config)}")
    config = model.peft_config[adapter_name]
    assert isinstance(config, (LorettaAdpConfig, LorettaRepConfig))
    if isinstance(config, LorettaAdpConfig) and config.activation != "identity":
        raise TypeError(
            f"a LoRA is linear: export_lora takes LoRETTA_rep adapters, and LoRETTA_adp ones with "
            f"non_linearity='identity', got {kind} with {config.non_linearity!r}"
        )
    return config


def _factors(layer: LorettaLayer, adapter_name: str, narrow: bool) -> _Factors:
    """Of an adapted linear; ``narrow``: of the least rank that the trains' shapes allow, instead of r."""
    if isinstance(layer, LorettaAdpLinear):
        a, b, bias = layer.lora_factors(adapter_name)
        return _Factors(a, b, bias=bias)
    assert isinstance(layer, LorettaRepLinear)
    a, b = (layer.narrow_factors if narrow else layer.factors)(adapter_name)
    return _Factors(a, b, layer.scaling[adapter_name])


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
