"""The rows that put both LoRETTA methods into the test matrices of PEFT.

`LISTS` names the module-level lists, `INLINE` the lists written inside the ``parametrize`` of one test. A row has the
form that PEFT's own rows have there. Beside them runs a LoRA row (`controls`), which tells a failure of the environment
from one of ours.
"""

from __future__ import annotations

import pytest
from gates import OURS
from peft import LoraConfig, PeftConfig

from loretta import LorettaAdpConfig, LorettaRepConfig

_LABEL = {LorettaRepConfig: "rep", LorettaAdpConfig: "adp"}

# Layouts that mean the same for both methods: (what the row is for, model, options).
_LAYOUTS: list[tuple[str, str, dict]] = [
    ("target given as a string", "MLP", {"target_modules": "lin0"}),
    ("one target", "MLP", {"target_modules": ["lin0"]}),
    ("output wider than two", "MLP", {"target_modules": ["lin1"]}),
    ("two targets", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("saved module", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("target is also saved", "MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("another width", "MLP2", {"target_modules": ["lin0", "lin1"]}),
    ("Conv1D of width one", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D and a linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ("explicit modes", "MLP", {"target_modules": ["lin0"], "tensor_shape": {10: [5, 2], 20: [5, 4]}}),
    ("bond ranks by name", "MLP", {"target_modules": ["lin0", "lin1"], "tensor_rank_pattern": {"lin1": 3}}),
    ("frozen norms", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"], "train_layernorm": False}),
    ("trained norms", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"], "train_layernorm": True}),
]
_REP_LAYOUTS: list[tuple[str, str, dict]] = [
    ("alpha and dropout", "MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("rank four", "MLP", {"target_modules": ["lin0"], "r": 4, "tensor_rank": 3}),
    ("r by name", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 3}}),
    ("half of a fused output", "MLP", {"target_modules": ["lin0"], "enable_lora": [True, False]}),
]
_ADP_LAYOUTS: list[tuple[str, str, dict]] = [
    ("linear", "MLP", {"target_modules": ["lin0", "lin1"], "non_linearity": "identity"}),
    ("on the input", "MLP", {"target_modules": ["lin0", "lin1"], "adapter_type": "mh_adapter"}),
    ("parallel", "MLP", {"target_modules": ["lin0", "lin1"], "use_parallel_adapter": True}),
    ("learned scaling", "MLP", {"target_modules": ["lin0"], "scaling": "learned"}),
    ("dense", "MLP", {"target_modules": ["lin0"], "tensorized": False}),
    ("dropout and small bottleneck", "MLP", {"target_modules": ["lin0"], "bottleneck_size": 5, "adapter_dropout": 0.1}),
    ("smooth activation", "MLP", {"target_modules": ["lin0"], "non_linearity": "silu"}),
]


def _custom_rows() -> list[tuple]:
    own = {LorettaRepConfig: _REP_LAYOUTS, LorettaAdpConfig: _ADP_LAYOUTS}
    return [
        (f"LoRETTA_{_LABEL[config_cls]} {name}", model, config_cls, dict(options))
        for config_cls in OURS
        for name, model, options in _LAYOUTS + own[config_cls]
    ]


def _two_adapter_rows() -> list[tuple]:
    """Two adapters at once, on the same and on different layers of the MLP."""
    first = {"target_modules": ["lin0"], "init_weights": False}
    second = {"Same": first, "Different": {"target_modules": ["lin1"], "init_weights": False}}
    return [
        (f"LoRETTA_{_LABEL[config_cls]} {name}", f"loretta_{_LABEL[config_cls]}", config_cls, dict(first), dict(other))
        for config_cls in OURS
        for name, other in second.items()
    ]


def _mixed_rows(name: str, first: dict, second: dict) -> list[tuple]:
    """Two adapters that serve one batch together."""
    return [
        (
            f"LoRETTA_{_LABEL[config_cls]} {name}",
            config_cls(init_weights=False, **first),
            config_cls(init_weights=False, **second),
        )
        for config_cls in OURS
    ]


def _model_rows(task_type: str) -> list:
    """Default targets and placements, with frozen and with trained norms; and adp beside the linears."""
    rows = [
        pytest.param(
            config_cls,
            {"task_type": task_type, "target_modules": None, "train_layernorm": norms},
            id=f"{_LABEL[config_cls]}-{'trained' if norms else 'frozen'}-norms",
        )
        for norms in (False, True)
        for config_cls in OURS
    ]
    parallel = {"use_parallel_adapter": True, "scaling": "learned"}
    options = {"task_type": task_type, "target_modules": None, "train_layernorm": False}
    return [*rows, pytest.param(LorettaAdpConfig, options | parallel, id="adp-parallel-frozen-norms")]


LISTS = {
    "test_custom_models": {
        "TEST_CASES": _custom_rows(),
        "ALL_PEFT_CONFIG_CLASSES": list(OURS),
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": _two_adapter_rows(),
        "MIXED_ADAPTER_TEST_CASES": _mixed_rows(
            "mixed", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "tensor_rank": 3}
        ),
    },
    "test_decoder_models": {"ALL_CONFIGS": _model_rows("CAUSAL_LM")},
    "test_encoder_decoder_models": {"ALL_CONFIGS": _model_rows("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": _model_rows("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": _model_rows("SEQ_CLS")},
}

_LIN0, _LIN1 = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
_SAVED = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
_CONV1D = {"target_modules": ["conv1d"]}
INLINE = {
    "test_multiple_adapters_mixed_modules_to_save": list(OURS),
    "test_multiple_adapters_mixed_modules_to_save_order_switched": list(OURS),
    "test_adapter_name_makes_no_difference": [
        config_cls(target_modules=["lin0"], init_weights=False) for config_cls in OURS
    ],
    "test_mixed_adapter_batches_different_target_layers": _mixed_rows("different layers", _LIN0, _LIN1),
    "test_mixed_adapter_batches_multiple_modules_to_save": _mixed_rows("saved modules", _SAVED, _SAVED),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": _mixed_rows(
        "overlapping layers", _LIN0, {"target_modules": ["lin0", "lin1"]}
    ),
    "test_mixed_adapter_batches_lora_conv1d_emb": _mixed_rows("Conv1D", _CONV1D, _CONV1D | {"tensor_rank": 3}),
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": _mixed_rows(
        "Conv1D and saved modules", _CONV1D | {"modules_to_save": ["lin0"]}, _CONV1D | {"modules_to_save": ["lin0"]}
    ),
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": [
        (f"LoRETTA_{_LABEL[config_cls]} wrong name", config_cls(target_modules=["lin0"], init_weights=False))
        for config_cls in OURS
    ],
    "test_default_target_modules_not_set_raises": list(OURS),
    "test_default_target_modules_not_set_model_type_set_raises": list(OURS),
}

# The LoRA rows of the long lists that serve as control; of a list without names the first LoRA row does.
_CONTROL_NAMES = {
    "Vanilla MLP 4 LoRA",
    "Embedding + transformers Conv1D 1 LoRA",
    "LoRA Same",
    "LoRA Different",
    "LoRA mixed adapter",
}


def config_class(value: object) -> type | None:
    """The config class that `value` (a cell of a row, or what a test was parametrised with) is or is an instance of."""
    if isinstance(value, type) and issubclass(value, PeftConfig):
        return value
    return type(value) if isinstance(value, PeftConfig) else None


def controls(rows: list) -> list:
    """The LoRA rows among PEFT's `rows` to keep."""
    cells = [row if isinstance(row, tuple) else (row,) for row in rows]
    lora = [row for row, row_cells in zip(rows, cells, strict=True) if LoraConfig in map(config_class, row_cells)]
    named = [row for row in lora if isinstance(row, tuple) and row[0] in _CONTROL_NAMES]
    return named or lora[:1]
