"""LoRETTA_rep as a plain LoRA: stock PEFT, without this package, sees the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, export_lora, get_peft_model
from loretta.rep import LorettaRepLinear
from tests.layers.fresh_process import run_fresh
from tests.tiny_models import tiny_logits, tiny_model, usual_task


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Logits and adapted modules of the rep model, and of its export in a process without loretta, per family."""
    root, cases = tmp_path_factory.mktemp("export"), []
    fields = {
        "llama": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 32}},
        "gpt2": {"enable_lora": [True, False, True], "bias": "lora_only"},
        "roberta": {"bias": "all"},
        "deberta": {},
        "t5": {"layers_to_transform": [1], "layers_pattern": "block"},
    }
    for model_type, more in fields.items():
        folder, task = root / model_type, usual_task(model_type)
        base = tiny_model(model_type)
        base.save_pretrained(folder / "base")
        config = LorettaRepConfig(task_type=task, init_weights=False, **more)
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "cores" not in name:
                nn.init.normal_(parameter, std=0.5)
        model.eval()
        export_lora(model, folder / "lora")
        adapted = [name for name, module in model.named_modules() if isinstance(module, LorettaRepLinear)]
        torch.save((tiny_logits(model, task), adapted), folder / "rep.pt")
        cases.append(str(folder))
    run_fresh("tests.layers.stock_cases", cases)
    return {name: tuple(torch.load(root / name / f"{kind}.pt") for kind in ("rep", "stock")) for name in fields}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "roberta", "deberta", "t5"])
def test_stock_peft_sees_the_same_logits(exported, model_type: str) -> None:
    (rep, adapted), (stock, adapted_by_stock) = exported[model_type]
    torch.testing.assert_close(stock, rep)
    assert adapted_by_stock == adapted


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path) -> None:
    adp = get_peft_model(tiny_model("llama"), LorettaAdpConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="LorettaAdpModel"):
        export_lora(adp, tmp_path)
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        export_lora(tiny_model("llama"), tmp_path)
    rep = get_peft_model(tiny_model("llama"), LorettaRepConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"'other'.*\['default'\]"):
        export_lora(rep, tmp_path, adapter_name="other")
    rep.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        export_lora(rep, tmp_path)
    assert list(tmp_path.iterdir()) == []
