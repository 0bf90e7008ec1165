"""Saved adapters reach a server: as plain LoRA without this package, and through PEFT's auto class with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, PeftModel, _versions, export_lora, get_peft_model
from loretta._versions import LOAD_ADAPTER_DROPS_MODULES
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


# What model.load_adapter of this transformers loads right.
NATIVE = ["rep-without-norms"] if LOAD_ADAPTER_DROPS_MODULES else ["adp", "rep", "rep-without-norms"]


def test_transformers_loads_an_exported_lora_without_this_package(served: Path) -> None:
    names = [name for name in NATIVE if name != "adp"]
    run_fresh("tests.serving.transformers_alone", [str(served), names])
    for name in names:
        torch.testing.assert_close(
            torch.load(served / name / "transformers.pt"), torch.load(served / name / "logits.pt")
        )


def test_the_auto_class_loads_both_methods_once_loretta_is_imported(served: Path) -> None:
    run_fresh("tests.serving.auto_class", [str(served), NATIVE])
    for name in ("adp", "rep", "rep-without-norms"):
        assert torch.equal(torch.load(served / name / "auto.pt"), torch.load(served / name / "logits.pt"))
    for name in NATIVE:
        torch.testing.assert_close(torch.load(served / name / "native.pt"), torch.load(served / name / "logits.pt"))


def test_a_transformers_that_drops_norms_is_not_let_load_them(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "LOAD_ADAPTER_DROPS_MODULES", True)
    base = tiny_model("llama")
    with pytest.raises(RuntimeError, match=r"load_adapter of transformers .* does not load .*norm.*from_pretrained"):
        base.load_adapter(str(served / "rep" / "adapter"))
    # All else goes on: no norms, a new adapter, and PEFT's way.
    tiny_model("llama").load_adapter(str(served / "rep-without-norms" / "adapter"))
    inject_adapter_in_model(LorettaRepConfig(task_type="CAUSAL_LM"), tiny_model("llama"))
    model = PeftModel.from_pretrained(tiny_model("llama"), str(served / "rep" / "adapter"))
    model.load_adapter(str(served / "rep" / "adapter"), adapter_name="again")


def test_every_file_of_weights_is_safetensors(served: Path) -> None:
    for folder in [*served.glob("*/adapter"), *served.glob("*/lora")]:
        weights = {path.name for path in folder.iterdir()} - {"README.md", "adapter_config.json"}
        assert weights == {"adapter_model.safetensors"}
