"""Configurations of the paper's models and one larger: `loretta params` and `loretta plan` work offline."""

from dataclasses import dataclass, field
from typing import Any

_LLAMA_2 = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA_3_1 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_ROBERTA = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
_OPT = {
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "do_layer_norm_before": True,
}


@dataclass(frozen=True)
class Preset:
    """A transformers configuration and the task that the paper uses the model for."""

    model_type: str
    task: str
    values: dict[str, Any] = field(repr=False)


def _llama(family: dict[str, Any], hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Preset:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return Preset("llama", "causal_lm", family | sizes)


def _opt(hidden: int, layers: int) -> Preset:
    sizes = {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
    }
    return Preset("opt", "causal_lm", _OPT | sizes)


def _roberta(hidden: int, layers: int, heads: int) -> Preset:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return Preset("roberta", "seq_cls", _ROBERTA | sizes)


PRESETS = {
    "llama-2-7b": _llama(_LLAMA_2, 4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(_LLAMA_2, 5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(_LLAMA_2, 8192, 28672, 80, 64, 8),
    "llama-3.1-405b": _llama(_LLAMA_3_1, 16384, 53248, 126, 128, 8),
    "deberta-base": Preset(
        "deberta",
        "seq_cls",
        {
            "vocab_size": 50265,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "type_vocab_size": 0,
            "layer_norm_eps": 1e-7,
            "relative_attention": True,
            "max_relative_positions": -1,
            "position_biased_input": False,
            "pos_att_type": ["c2p", "p2c"],
            "pooler_dropout": 0,
            "pooler_hidden_act": "gelu",
            "pooler_hidden_size": 768,
        },
    ),
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
    "opt-1.3b": _opt(2048, 24),
    "opt-2.7b": _opt(2560, 32),
    "opt-6.7b": _opt(4096, 32),
}
