"""Tiny models on disk, loaded under every kind of quantisation, and what their weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from loretta import LorettaAdpConfig, LorettaRepConfig
from tests.tiny_models import tiny_batch, tiny_model

CONFIGS: dict[str, Any] = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", bottleneck_size=8, init_weights=False),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", lora_dropout=0.0, init_weights=False),
}


def _nf4(double: bool) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype="float32"
    )


def _bnb_int8() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao(name: str, **bits: Any) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    if bits:
        bits["granularity"] = quantization.PerGroup(32)
    return TorchAoConfig(getattr(quantization, name)(**bits))


WEIGHTS_ONLY: dict[str, Callable[[], Any]] = {
    "nf4": lambda: _nf4(double=False),
    "nf4-double": lambda: _nf4(double=True),
    "int8": _bnb_int8,
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}


def save_llama(folder: Path, layers: int = 2) -> Path:
    """A Llama whose linears divide into blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": layers}
    tiny_model("llama", **sizes).save_pretrained(folder)
    return folder


def load(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The saved model, quantised on the CPU."""
    options = {"quantization_config": config, "device_map": "cpu", "dtype": dtype}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def quantised_layers(model: nn.Module) -> dict[str, tuple[nn.Module, QuantizationBackend]]:
    """Every quantised linear of a model, wrapped or not, with PEFT's backend for it."""
    options = get_quantization_kwargs(model.get_base_model() if hasattr(model, "get_base_model") else model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (backend := resolve_quantization_backend(module, **options)):
            found[name] = module, backend
    return found


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every frozen weight as it is stored, and what the quantised ones stand for."""
    found = {
        f"{name} dequantised": backend.get_base_weight(layer).clone()
        for name, (layer, backend) in quantised_layers(model).items()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parts = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else ["data"]
            found |= {f"{name}.{part}": getattr(parameter, part).detach().clone() for part in parts}
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A training step's gradient of every trained parameter."""
    model.train()
    model.zero_grad()
    model(**tiny_batch("CAUSAL_LM")).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
