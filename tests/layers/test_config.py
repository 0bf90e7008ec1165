"""The configurations: defaults work as they stand, a wrong value names what is accepted, files round-trip."""

from __future__ import annotations

import pickle

import pytest
from peft import PeftConfig

from loretta import LorettaAdpConfig, LorettaRepConfig


def test_the_api_works_as_written() -> None:
    adp = LorettaAdpConfig(
        bottleneck_size=64,
        non_linearity="relu",
        adapter_dropout=0.0,
        target_modules=None,
        scaling=1.0,
        bias="none",
        task_type="CAUSAL_LM",
        tensor_rank=5,
    )
    rep = LorettaRepConfig(
        r=8,
        lora_alpha=16,
        target_modules=None,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        tensor_rank=5,
    )
    assert (adp.peft_type.value, rep.peft_type.value) == ("LORETTA_ADP", "LORETTA_REP")
    assert adp == LorettaAdpConfig(task_type="CAUSAL_LM")
    assert rep == LorettaRepConfig(task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("config_class", "field", "value", "accepted"),
    [
        (LorettaAdpConfig, "bottleneck_size", 0, "at least 1"),
        (LorettaAdpConfig, "bottleneck_size", 6.4, "integer"),
        (LorettaAdpConfig, "non_linearity", "sigmoid", "'relu', 'gelu'"),
        (LorettaAdpConfig, "adapter_dropout", 1.0, r"\[0, 1\)"),
        (LorettaAdpConfig, "adapter_dropout", float("nan"), r"\[0, 1\)"),
        (LorettaAdpConfig, "scaling", "lernt", "'learned'"),
        (LorettaAdpConfig, "scaling", float("inf"), "finite"),
        (LorettaAdpConfig, "bias", "lora_only", "'adapter_only'"),
        (LorettaAdpConfig, "init_weights", "mam_adapter", "'gaussian'"),
        (LorettaAdpConfig, "init_weights", 1, "'gaussian'"),
        (LorettaAdpConfig, "adapter_type", "houlsby", "'mh_adapter', 'output_adapter'"),
        (LorettaAdpConfig, "adapter_type", {"fc1": "left"}, "'mh_adapter', 'output_adapter'"),
        (LorettaAdpConfig, "tensorized", "yes", "True or False"),
        (LorettaAdpConfig, "tensor_rank", True, "integer"),
        (LorettaAdpConfig, "tensor_rank", 0, "at least 1"),
        (LorettaAdpConfig, "tensor_shape", {64: [4, 4]}, "64"),
        (LorettaAdpConfig, "tensor_shape", {64: [8, -8, -1]}, "positive"),
        (LorettaAdpConfig, "tensor_shape", [4, 4, 4], "dict"),
        (LorettaAdpConfig, "target_modules", [3], "list of module names"),
        (LorettaAdpConfig, "modules_to_save", "lm_head", "list of module names"),
        (LorettaAdpConfig, "modules_to_save", [3], "list of module names"),
        (LorettaAdpConfig, "rank_pattern", [3], "dict"),
        (LorettaAdpConfig, "matrix_shapes", [3], "dict"),
        (LorettaAdpConfig, "matrix_shapes", {"4x6": [4, 6]}, "in_modes, out_modes and ranks"),
        (
            LorettaAdpConfig,
            "matrix_shapes",
            {"4x6": {"in_modes": [4], "out_modes": [6], "ranks": [2, 2]}},
            "1 inner bonds",
        ),
        (
            LorettaAdpConfig,
            "matrix_shapes",
            {"4x6": {"in_modes": [6], "out_modes": [4], "ranks": [2]}},
            "is one of 6x4",
        ),
        (LorettaAdpConfig, "tensor_rank_pattern", {"fc1": 0}, "at least 1"),
        (LorettaRepConfig, "tensor_rank_pattern", [3], "dict"),
        (LorettaAdpConfig, "train_layernorm", None, "True or False"),
        (LorettaAdpConfig, "task_type", "CAUSAL", "SEQ_CLS"),
        (LorettaRepConfig, "r", 0, "at least 1"),
        (LorettaRepConfig, "r", "8", "integer"),
        (LorettaRepConfig, "lora_alpha", "big", "finite number"),
        (LorettaRepConfig, "rank_pattern", {"fc1": 0}, "at least 1"),
        (LorettaRepConfig, "lora_dropout", -0.1, r"\[0, 1\)"),
        (LorettaRepConfig, "bias", "adapter_only", "'lora_only'"),
        (LorettaRepConfig, "enable_lora", [False, False], "at least one True"),
        (LorettaRepConfig, "enable_lora", [1, 0, 1], "bools"),
        (LorettaRepConfig, "enable_lora", "qv", "bools"),
        (LorettaRepConfig, "alpha_pattern", {"q_proj": None}, "finite number"),
        (LorettaRepConfig, "merge_weights", 1, "True or False"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(config_class, field, value, accepted) -> None:
    with pytest.raises(ValueError, match=accepted):
        config_class(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"use_parallel_adapter": True, "use_adapterp": True},
        {"use_parallel_adapter": True, "adapter_type": "mh_adapter"},
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        {"layers_pattern": "layers"},
        {"rank_pattern": {"fc1": 2}, "tensor_rank_pattern": {"fc2": 3}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_fields_that_exclude_each_other_raise(fields) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        LorettaAdpConfig(**fields)


@pytest.mark.parametrize(
    "config",
    [
        LorettaAdpConfig(scaling="learned", tensor_shape={4096: (16, 16, 16)}, target_modules=["fc1", "fc2"]),
        LorettaRepConfig(
            enable_lora=[True, False], rank_pattern={"q": 4}, init_weights="gaussian", task_type="SEQ_CLS"
        ),
        LorettaAdpConfig(tensor_rank_pattern={"fc1": 3}),
    ],
    ids=["adp", "rep", "ranks"],
)
def test_a_saved_config_reads_back_equal(config, tmp_path) -> None:
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_explicit_modes_are_found_by_size() -> None:
    config = LorettaAdpConfig(tensor_shape={4096: [16, 16, 16]})
    assert config.modes(4096) == (16, 16, 16)
    assert config.modes(64) is None
