"""`loretta merge` and `export` of adp adapters without a nonlinearity, and the bases that cannot hold their biases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from loretta import LorettaAdpConfig, get_peft_model


def save_adapter(base: Path, folder: Path) -> Path:
    config = LorettaAdpConfig(task_type="CAUSAL_LM", non_linearity="identity", init_weights=False, bottleneck_size=8)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def test_merge_and_export_give_the_same_loss(loretta: Any, llama: Path, book: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "adapter")
    evaluation = ["--data", book, "--seq-len", 32, "--eval-limit", 8, "--json"]
    expected = loretta("eval", "--adapter", adapter, *evaluation).result()["loss"]
    for verb, option in {"merge": "--model", "export": "--adapter"}.items():
        ran = loretta(verb, "--adapter", adapter, "--output", tmp_path / verb)
        assert ran.code == 0, ran.err
        loss = loretta("eval", option, tmp_path / verb, *evaluation).result()["loss"]
        assert math.isclose(loss, expected, rel_tol=1e-5)


def test_merge_refuses_a_base_that_would_lose_the_biases(loretta: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    ran = loretta("merge", "--adapter", adapter, "--output", tmp_path / "merged")
    assert ran.code == 2
    assert "merging gave a bias to 3 linears that had none" in ran.err
    assert not (tmp_path / "merged").exists()
    assert loretta("export", "--adapter", adapter, "--output", tmp_path / "lora").code == 0
