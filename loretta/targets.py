"""One table: what is adapted in each model family when ``target_modules`` is not given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


@dataclass(frozen=True)
class Family:
    """What is adapted in one architecture, by the end of its modules' names.

    Attributes:
        rep: the attention projections that LoRETTA_rep adapts (query and value, or the fused projection).
        before: linears that LoRETTA_adp adapts on their input: the entry of a feed-forward block.
        after: modules that LoRETTA_adp adapts on their output: the linear at the exit of a feed-forward block, or the
            whole block where its experts are no linears.
        before_if_named: linears that LoRETTA_adp adapts on their input where ``target_modules`` names them.
        after_attention: linears of the attention's exit that LoRETTA_adp also adapts on their output.
        head: where the dense layer of a sequence-classification head is, from the head's name on.
    """

    rep: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    after_attention: tuple[str, ...] = ()
    before_if_named: tuple[str, ...] = ()
    head: str | None = None


_GATED = Family(("q_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
_FC = Family(("q_proj", "v_proj"), ("fc1",), ("fc2",))
_BART = Family(("q_proj", "v_proj"), ("fc1",), ("fc2",), head="classification_head.dense")
_NEOX = Family(("query_key_value",), ("dense_h_to_4h",), ("dense_4h_to_h",))
_T5 = Family(("q", "v"), ("wi", "wi_0", "wi_1"), ("wo",), head="classification_head.dense")
# The suffix "output.dense" names the exits of both blocks: the attention's is told apart by its longer name.
_BERT = Family(("query", "value"), (), ("output.dense",), ("attention.output.dense",))
_ROBERTA = Family(_BERT.rep, (), _BERT.after, _BERT.after_attention, head="classifier.dense")
# Mixture-of-experts models hold their experts as parameters, not as linears: the whole block is adapted.
_EXPERTS = Family(("q_proj", "v_proj"), (), ("mlp",))

FAMILIES: dict[str, Family] = {
    "bart": _BART,
    "bert": _BERT,
    "bloom": _NEOX,
    "camembert": _ROBERTA,
    "deberta": Family(("in_proj",), (), _BERT.after, _BERT.after_attention, head="pooler.dense"),
    "deberta-v2": Family(("query_proj", "value_proj"), (), _BERT.after, _BERT.after_attention, head="pooler.dense"),
    "deepseek_v3": Family(("q_proj", "q_b_proj", "kv_b_proj"), (), ("mlp",)),
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
    "gpt_oss": _EXPERTS,
    "gptj": Family(("q_proj", "v_proj"), ("fc_in",), ("fc_out",)),
    "granite": _GATED,
    "granitemoe": Family(("q_proj", "v_proj"), (), ("block_sparse_moe",)),
    "llama": _GATED,
    "llama4_text": Family(("q_proj", "v_proj"), (), ("feed_forward",), before_if_named=("gate_proj", "up_proj")),
    "m2m_100": _FC,
    "marian": _FC,
    "mbart": _BART,
    "mistral": _GATED,
    "mixtral": _EXPERTS,
    "modernbert": Family(("Wqkv",), ("mlp.Wi",), ("mlp.Wo",)),
    "mt5": _T5,
    "olmo": _GATED,
    "olmo2": _GATED,
    "olmoe": _EXPERTS,
    "opt": _FC,
    "pegasus": _FC,
    "phi": _FC,
    "phi3": Family(("qkv_proj",), ("gate_up_proj",), ("down_proj",)),
    "qwen2": _GATED,
    "qwen2_moe": _EXPERTS,
    "qwen3": _GATED,
    "qwen3_moe": _EXPERTS,
    "roberta": _ROBERTA,
    "smollm3": _GATED,
    "stablelm": _GATED,
    "starcoder2": Family(("q_proj", "v_proj"), ("c_fc",), ("c_proj",)),
    "t5": _T5,
    "xlm-roberta": _ROBERTA,
}


class TargetTable(Mapping[str, "Sequence[str]"]):
    """The view of ``FAMILIES`` that PEFT reads: model type to target names, for one method.

    Args:
        fields: the fields of ``Family`` whose names the method targets.
        others: the targets, or a regex, of model types that have no family.
    """

    def __init__(self, *fields: str, others: Mapping[str, Sequence[str]] | None = None) -> None:
        self.fields = fields
        self.others = others or {}

    def __getitem__(self, model_type: str) -> Sequence[str]:
        if model_type not in FAMILIES:
            return self.others[model_type]
        names = [name for field in self.fields for name in getattr(FAMILIES[model_type], field)]
        if not names:
            raise KeyError(model_type)
        return names

    def __iter__(self) -> Iterator[str]:
        return (model_type for model_type in dict.fromkeys([*FAMILIES, *self.others]) if model_type in self)

    def __len__(self) -> int:
        return len(list(iter(self)))


REP_TARGETS = TargetTable("rep", others=TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
ADP_TARGETS = TargetTable("before", "after", "after_attention")
