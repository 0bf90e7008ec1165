"""Cores with gains: a rate moves an adapter as far as a LoRA at any width, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loretta import LorettaAdpConfig, LorettaRepConfig, export_lora, get_peft_model
from loretta.layer import adapter_train
from tests.tiny_models import tiny_logits, tiny_model

CONFIGS: dict[str, Any] = {"adp": LorettaAdpConfig, "rep": LorettaRepConfig}
every_method = pytest.mark.parametrize("method", CONFIGS)


def moved(width: int, core_gain: str, is_up: bool, rate: float = 1e-3) -> float:
    """How far one step of Adam moves the train's matrix, over sqrt(waist · width) times the rate."""
    torch.manual_seed(0)
    config = LorettaRepConfig(core_gain=core_gain, init_weights="gaussian" if core_gain == "paper" else True)
    train = adapter_train(config, 8 if is_up else width, width if is_up else 8, 5, up=is_up)
    before = train.matrix().detach()
    optimizer = torch.optim.Adam(train.parameters(), lr=rate)
    (train.matrix() * torch.randn(train.shape.in_features, train.shape.out_features)).sum().backward()
    optimizer.step()
    return ((train.matrix() - before).norm() / (rate * (train.shape.waist * width) ** 0.5)).item()


@pytest.mark.parametrize("is_up", [False, True], ids=["down", "up"])
def test_a_step_moves_every_entry_by_the_rate_at_every_width(is_up):
    assert all(0.5 < moved(width, "rate", is_up) < 3 for width in (256, 1024, 4096))


def test_without_gains_a_step_moves_less_the_wider_the_layer():
    narrow, wide = (moved(width, "paper", is_up=False) for width in (256, 4096))
    assert wide < 0.3 < 0.5 < narrow


@every_method
def test_starts_as_the_base_model(method):
    base = tiny_model("llama", "CAUSAL_LM")
    bare = tiny_logits(base.eval(), "CAUSAL_LM")
    model = get_peft_model(base, CONFIGS[method](task_type="CAUSAL_LM"))
    assert model.peft_config["default"].core_gain == "rate"
    assert torch.equal(tiny_logits(model.eval(), "CAUSAL_LM"), bare)


@every_method
def test_a_saved_adapter_that_does_not_say_has_no_gains(method, tmp_path: Path):
    """Every adapter made before there were gains gives the logits that it gave."""
    config = CONFIGS[method](task_type="CAUSAL_LM", core_gain="paper", init_weights=False)
    model = get_peft_model(tiny_model("llama", "CAUSAL_LM"), config)
    logits = tiny_logits(model.eval(), "CAUSAL_LM")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("core_gain") == "paper"
    file.write_text(json.dumps(fields))
    reloaded = PeftModel.from_pretrained(tiny_model("llama", "CAUSAL_LM"), tmp_path)
    assert reloaded.peft_config["default"].core_gain == "paper"
    assert torch.equal(tiny_logits(reloaded.eval(), "CAUSAL_LM"), logits)


@every_method
def test_reloads_with_its_gains(method, tmp_path: Path):
    config = CONFIGS[method](task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(tiny_model("llama", "CAUSAL_LM"), config)
    trains = [module for module in model.modules() if hasattr(module, "cores")]
    assert any(any(train.shape.gains) for train in trains)
    logits = tiny_logits(model.eval(), "CAUSAL_LM")
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model("llama", "CAUSAL_LM"), tmp_path)
    assert torch.equal(tiny_logits(reloaded.eval(), "CAUSAL_LM"), logits)


@every_method
def test_merged_and_exported_with_its_gains(method, tmp_path: Path):
    linear = {"non_linearity": "identity"} if method == "adp" else {}
    config = CONFIGS[method](task_type="CAUSAL_LM", init_weights=False, target_modules=["q_proj", "v_proj"], **linear)
    model = get_peft_model(tiny_model("llama", "CAUSAL_LM"), config)
    logits = tiny_logits(model.eval(), "CAUSAL_LM")
    export_lora(model, tmp_path)
    exported = PeftModel.from_pretrained(tiny_model("llama", "CAUSAL_LM"), tmp_path)
    torch.testing.assert_close(tiny_logits(exported.eval(), "CAUSAL_LM"), logits, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(tiny_logits(model, "CAUSAL_LM"), logits, rtol=1e-4, atol=1e-5)


@every_method
def test_an_unknown_gain_is_named(method):
    with pytest.raises(ValueError, match=r"core_gain must be .*'rate'.*'paper'.*'lora'"):
        CONFIGS[method](core_gain="lora")
