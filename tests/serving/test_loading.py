"""Saved adapters reach a server: as plain LoRA without this package, and through PEFT's auto class with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, export_lora, get_peft_model
from tests.layers.fresh_process import run_fresh
from tests.tiny_models import tiny_logits, tiny_model


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of both methods on a saved base, the rep ones also as plain LoRA, and the logits of each."""
    root = tmp_path_factory.mktemp("served")
    tiny_model("llama").save_pretrained(root / "base")
    for name, make, norms in [
        ("adp", LorettaAdpConfig, True),
        ("rep", LorettaRepConfig, True),
        ("rep-without-norms", LorettaRepConfig, False),
    ]:
        base = tiny_model("llama")
        base.name_or_path = base.config._name_or_path = str(root / "base")
        model = get_peft_model(base, make(task_type="CAUSAL_LM", init_weights=False, train_layernorm=norms)).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "cores" not in parameter_name:
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(root / name / "adapter")
        if name != "adp":
            export_lora(model, root / name / "lora")
        torch.save(tiny_logits(model, "CAUSAL_LM"), root / name / "logits.pt")
    return root


def test_transformers_loads_an_exported_lora_without_this_package(served: Path) -> None:
    run_fresh("tests.serving.transformers_alone", str(served))
    for name in ("rep", "rep-without-norms"):
        torch.testing.assert_close(
            torch.load(served / name / "transformers.pt"), torch.load(served / name / "logits.pt")
        )


def test_the_auto_class_loads_both_methods_once_loretta_is_imported(served: Path) -> None:
    run_fresh("tests.serving.auto_class", str(served))
    for name in ("adp", "rep"):
        assert torch.equal(torch.load(served / name / "auto.pt"), torch.load(served / name / "logits.pt"))
        torch.testing.assert_close(torch.load(served / name / "native.pt"), torch.load(served / name / "logits.pt"))


def test_every_file_of_weights_is_safetensors(served: Path) -> None:
    for folder in [*served.glob("*/adapter"), *served.glob("*/lora")]:
        weights = {path.name for path in folder.iterdir()} - {"README.md", "adapter_config.json"}
        assert weights == {"adapter_model.safetensors"}
