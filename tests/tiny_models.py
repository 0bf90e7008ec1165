"""Tiny random models of every family in the table, made from their configs: no download, the same from one seed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

VOCABULARY = 61
HIDDEN = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_ROTARY: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_BART: dict[str, Any] = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_T5: dict[str, Any] = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}

_SIZES: dict[str, dict[str, Any]] = {
    "bart": _BART,
    "bert": _ENCODER,
    "bloom": {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
    "camembert": _ENCODER,
    "deberta": {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "deepseek_v3": {
        **_ROTARY,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "head_dim": 4,
        "v_head_dim": 8,
    },
    "distilbert": {"dim": HIDDEN, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "electra": {**_ENCODER, "embedding_size": HIDDEN},
    "falcon": {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma": _ROTARY,
    "gemma2": _ROTARY,
    "gemma3_text": {**_ROTARY, "sliding_window": 16},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
        "window_size": 16,
    },
    "gpt_neox": _ENCODER,
    "gpt_oss": {**_ROTARY, **_EXPERTS, "sliding_window": 16},
    "gptj": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "granite": _ROTARY,
    "granitemoe": {**_ROTARY, **_EXPERTS},
    "llama": _ROTARY,
    "llama4_text": {**_ROTARY, **_EXPERTS, "intermediate_size_mlp": 48, "num_experts_per_tok": 1, "moe_layers": [1]},
    "m2m_100": _BART,
    "marian": _BART,
    "mbart": _BART,
    "mistral": _ROTARY,
    "mixtral": {**_ROTARY, **_EXPERTS},
    "modernbert": _ENCODER,
    "mt5": _T5,
    "olmo": _ROTARY,
    "olmo2": _ROTARY,
    "olmoe": {**_ROTARY, **_EXPERTS},
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "pegasus": _BART,
    "phi": {**_ROTARY, "num_key_value_heads": 4},
    "phi3": _ROTARY,
    "qwen2": _ROTARY,
    "qwen2_moe": {
        **_ROTARY,
        **_EXPERTS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "qwen3": _ROTARY,
    "qwen3_moe": {**_ROTARY, **_EXPERTS, "moe_intermediate_size": 16},
    "roberta": _ENCODER,
    "smollm3": _ROTARY,
    "stablelm": _ROTARY,
    "starcoder2": _ROTARY,
    "t5": _T5,
    "xlm-roberta": _ENCODER,
}
ENCODERS = [
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "roberta",
    "xlm-roberta",
]
ENCODER_DECODERS = ["bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5"]


AUTO_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


def usual_task(model_type: str) -> str:
    """The task that models of this family are mostly fine-tuned for."""
    if model_type in ENCODERS:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model_type in ENCODER_DECODERS else "CAUSAL_LM"


def tiny_model(model_type: str, task_type: str | None = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random two-layer model of the family, hidden size 32, for the task."""
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    task_type = task_type or usual_task(model_type)
    labels = 2 if task_type == "QUESTION_ANS" else 3
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, num_labels=labels, **special, **{**_SIZES[model_type], **overrides}
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AUTO_CLASSES[task_type].from_config(config)
    return model.eval()


def tiny_batch(task_type: str, batch: int = 2, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs and labels for a model of that task."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    ids[:, -1] = 2  # the end token, which the heads of BART and T5 look for
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        inputs["labels"] = ids
    elif task_type == "SEQ_CLS":
        inputs["labels"] = torch.arange(batch) % 3
    elif task_type == "TOKEN_CLS":
        inputs["labels"] = ids % 3
    elif task_type == "QUESTION_ANS":
        inputs["start_positions"] = torch.arange(batch)
        inputs["end_positions"] = torch.arange(batch) + 1
    return inputs


@torch.no_grad()
def tiny_logits(model: torch.nn.Module, task_type: str) -> torch.Tensor:
    """The model's logits for the inputs of ``tiny_batch``."""
    batch = {name: value for name, value in tiny_batch(task_type).items() if name != "labels"}
    if task_type == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = batch["input_ids"]
    logits: torch.Tensor = model(**batch).logits
    return logits
