"""Base models for adapters of the released package: one layer, of sizes it knows, with weights that never change.

Imports neither loretta: the released package's process builds the same models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

VOCABULARY = 31
AUTO_CLASSES = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}

ADP: dict[str, Any] = {"non_linearity": "relu", "adapter_dropout": 0.0, "scaling": 1.0, "bias": "none"}
REP: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none", "tensor_rank": 2}
COMMITTED = ["llama-adp", "llama-rep-straddling", "opt-adp-unaligned", "roberta-rep", "deberta-rep-complete"]
# name: model type, its sizes, method, its config, whether everything trained is saved (the docs' way) or what
# save_pretrained saves.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], bool]] = {
    "llama-adp": ("llama", {"hidden_size": 768}, "adp", {**ADP, "bottleneck_size": 8, "tensor_rank": 5}, False),
    "llama-rep-straddling": ("llama", {"hidden_size": 1024}, "rep", REP, False),
    "opt-adp-unaligned": (
        "opt",
        {"hidden_size": 1280, "num_attention_heads": 20},
        "adp",
        {
            **ADP,
            "bottleneck_size": 64,
            "tensor_rank": 2,
            "non_linearity": "gelu_new",
            "scaling": "learned",
            "target_modules": ["fc2"],
            "bias": "adapter_only",
        },
        False,
    ),
    "opt-adp-dense": (
        "opt",
        {"hidden_size": 768},
        "adp",
        {**ADP, "bottleneck_size": 5, "tensor_rank": 5, "tensorized": False, "target_modules": ["fc1"]},
        False,
    ),
    "roberta-rep": ("roberta", {"hidden_size": 768}, "rep", {**REP, "tensor_rank": 3}, False),
    "roberta-adp-complete": (
        "roberta",
        {"hidden_size": 768},
        "adp",
        {**ADP, "bottleneck_size": 8, "tensor_rank": 2},
        True,
    ),
    "deberta-rep-complete": ("deberta", {"hidden_size": 768}, "rep", REP, True),
    "gpt2-rep-fused": ("gpt2", {"hidden_size": 768}, "rep", REP, False),
}


def task_of(name: str) -> str:
    return "SEQ_CLS" if name.startswith(("roberta", "deberta")) else "CAUSAL_LM"


def base_config(name: str) -> PretrainedConfig:
    """The configuration of a case's base model."""
    model_type, sizes, *_ = CASES[name]
    hidden = sizes["hidden_size"]
    fields = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_hidden_layers": 1, "num_attention_heads": 16,
        "intermediate_size": 24, "ffn_dim": 24, "n_inner": 24, "word_embed_proj_dim": hidden, "num_labels": 3,
        "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": hidden, **sizes,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    return config


def base_model(name: str) -> nn.Module:
    """A case's base model, its weights from numpy's frozen generator."""
    model = AUTO_CLASSES[task_of(name)].from_config(base_config(name))
    fill(model.named_parameters(), 0.03)
    return model.eval()


@torch.no_grad()
def fill(parameters: Any, std: float) -> None:
    """Add to norms' weights, and set everything else to, normal numbers that depend on the order alone."""
    generator = np.random.RandomState(0)
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        values = torch.from_numpy(generator.standard_normal(tuple(parameter.shape)).astype("float32"))
        is_norm_weight = "norm" in name.lower() or ".ln_" in name
        parameter.copy_(std * values + (1.0 if is_norm_weight and name.endswith("weight") else 0.0))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """The model's logits for two fixed rows, of the last two tokens where each has some."""
    ids = torch.arange(3, 19).reshape(2, 8) % VOCABULARY
    result = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result[:, -2:] if result.dim() == 3 else result
