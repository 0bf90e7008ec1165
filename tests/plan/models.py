"""Small models, on the meta device and real, with each method."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
}
METHODS: dict[str, Any] = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", bottleneck_size=8, adapter_dropout=0.1),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM"),
    "lora": LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1),
    "full": None,
}


def build(
    method: str,
    layers: int,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str = "meta",
    family: str = "llama",
) -> nn.Module:
    """A model of so many blocks in training mode, with the method's adapters."""
    config = AutoConfig.for_model(family, num_hidden_layers=layers, **SIZES)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if METHODS[method] is None:
        return base.train()
    return get_peft_model(base, copy.deepcopy(METHODS[method]), low_cpu_mem_usage=device == "meta").train()
