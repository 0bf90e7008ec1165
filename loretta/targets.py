"""One table: what is adapted in each model family when ``target_modules`` is not given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The linears of one architecture, by the end of their names.

    Attributes:
        rep: the attention projections that LoRETTA_rep adapts (query and value, or the fused projection).
        before: linears that LoRETTA_adp adapts on their input: the entry of a feed-forward block.
        after: linears that LoRETTA_adp adapts on their output: the exit of a feed-forward block.
        after_attention: linears of the attention's exit that LoRETTA_adp also adapts on their output.
        head: where the dense layer of a sequence-classification head is, from the head's name on.
    """

    rep: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    after_attention: tuple[str, ...] = ()
    head: str | None = None


_GATED = Family(("q_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
_FC = Family(("q_proj", "v_proj"), ("fc1",), ("fc2",))
_BART = Family(("q_proj", "v_proj"), ("fc1",), ("fc2",), head="classification_head.dense")
_NEOX = Family(("query_key_value",), ("dense_h_to_4h",), ("dense_4h_to_h",))
_T5 = Family(("q", "v"), ("wi", "wi_0", "wi_1"), ("wo",), head="classification_head.dense")
# The suffix "output.dense" names the exits of both blocks: the attention's is told apart by its longer name.
_BERT = Family(("query", "value"), (), ("output.dense",), ("attention.output.dense",))
_ROBERTA = Family(_BERT.rep, (), _BERT.after, _BERT.after_attention, head="classifier.dense")
# Mixture-of-experts models hold their experts as one parameter, not as linears.
_EXPERTS = Family(("q_proj", "v_proj"), (), (), ("o_proj",))

FAMILIES: dict[str, Family] = {
    "bart": _BART,
    "bert": _BERT,
    "bloom": _NEOX,
    "camembert": _ROBERTA,
    "deberta": Family(("in_proj",), (), _BERT.after, _BERT.after_attention, head="pooler.dense"),
    "deberta-v2": Family(("query_proj", "value_proj"), (), _BERT.after, _BERT.after_attention, head="pooler.dense"),
    "distilbert": Family(("q_lin", "v_lin"), ("ffn.lin1",), ("ffn.lin2",)),
    "electra": _ROBERTA,
    "falcon": _NEOX,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": _GATED,
    "gemma3_text": _GATED,
    "gpt2": Family(("c_attn",), ("c_fc",), ("mlp.c_proj",)),
    "gpt_neo": Family(("q_proj", "v_proj"), ("c_fc",), ("mlp.c_proj",)),
    "gpt_neox": _NEOX,
    "gptj": Family(("q_proj", "v_proj"), ("fc_in",), ("fc_out",)),
    "granite": _GATED,
    "llama": _GATED,
    "llama4_text": _GATED,
    "m2m_100": _FC,
    "marian": _FC,
    "mbart": _BART,
    "mistral": _GATED,
    "mixtral": _EXPERTS,
    "modernbert": Family(("Wqkv",), ("mlp.Wi",), ("mlp.Wo",)),
    "mt5": _T5,
    "olmo": _GATED,
    "olmo2": _GATED,
    "opt": _FC,
    "pegasus": _FC,
    "phi": _FC,
    "phi3": Family(("qkv_proj",), ("gate_up_proj",), ("down_proj",)),
    "qwen2": _GATED,
    "qwen3": _GATED,
    "qwen3_moe": _EXPERTS,
    "roberta": _ROBERTA,
    "smollm3": _GATED,
    "stablelm": _GATED,
    "starcoder2": Family(("q_proj", "v_proj"), ("c_fc",), ("c_proj",)),
    "t5": _T5,
    "xlm-roberta": _ROBERTA,
}


class TargetTable(Mapping[str, list[str]]):
    """The view of ``FAMILIES`` that PEFT reads: model type to target names, for one method.

    Args:
        fields: the fields of ``Family`` whose names the method targets.
    """

    def __init__(self, *fields: str) -> None:
        self.fields = fields

    def __getitem__(self, model_type: str) -> list[str]:
        family = FAMILIES[model_type]
        return [name for field in self.fields for name in getattr(family, field)]

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILIES)

    def __len__(self) -> int:
        return len(FAMILIES)
