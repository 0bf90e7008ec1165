"""A hub cache on disk with the tiny models that PEFT's tests load by name.

PEFT's tests call ``from_pretrained("peft-internal-testing/tiny-random-OPTForCausalLM")`` and the like. Here these names
lead, in the layout of a Hugging Face cache, to models of the same architecture and of similar tiny sizes, their weights
drawn from a fixed seed: the tests run with ``HF_HUB_OFFLINE=1``, and nothing in transformers or PEFT is patched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

_REVISION = "0" * 40
_SEED = 0

# The tests feed the token ids 0 to 2 and generate at most some twenty tokens.
_TEXT = {"vocab_size": 128, "max_position_embeddings": 64, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0}
# 37, the feed-forward size of the hub's tiny models, is a prime: one mode of a tensor train.
_ENCODER = {
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # with 0.02 two adapters differ by less than the tests' tolerance
    "initializer_range": 0.2,
}
_DECODER = _TEXT | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
_DEBERTA = _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_GPT = {
    "vocab_size": 128,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

# hub name -> (architecture, fields of its config)
MODELS: dict[str, tuple[str, dict]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        _TEXT
        | {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "init_std": 0.2,
        },
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", _GPT | {"rotary_dim": 4}),
    # 32 = 2 heads of 16 for keys and values: PEFT's SVD of two LoRA adapters wants no side under its rank, 20
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DECODER | {"head_dim": 16}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _DECODER | {"tie_word_embeddings": True}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        _DECODER | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 128,
            "d_model": 32,
            "d_ff": 37,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        _TEXT
        | {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 4,
            "decoder_ffn_dim": 4,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": None,
            "init_std": 0.2,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        _DECODER | {"num_labels": 1},
    ),
}


def build(cache: Path) -> None:
    """Write every model of `MODELS` into the hub cache folder `cache`."""
    transformers.utils.logging.disable_progress_bar()
    for name, (architecture, fields) in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        model_class = getattr(transformers, architecture)
        torch.manual_seed(_SEED)
        model = model_class(model_class.config_class(**fields))
        model.save_pretrained(folder / "snapshots" / _REVISION)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(_REVISION)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
