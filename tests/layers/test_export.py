"""Linear adapters as plain LoRAs: stock PEFT, without this package, sees the same logits."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, export_lora, get_peft_model
from loretta.layer import LorettaLayer
from tests.layers.fresh_process import run_fresh
from tests.tiny_models import tiny_logits, tiny_model, usual_task

linear_adp = partial(LorettaAdpConfig, non_linearity="identity")
CASES: dict[str, Any] = {
    "llama": (LorettaRepConfig, {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 32}}),
    "gpt2": (LorettaRepConfig, {"enable_lora": [True, False, True], "bias": "lora_only"}),
    "roberta": (LorettaRepConfig, {"bias": "all"}),
    "deberta": (LorettaRepConfig, {}),
    "t5": (LorettaRepConfig, {"layers_to_transform": [1], "layers_pattern": "block"}),
    "llama+adp": (linear_adp, {"scaling": "learned"}),
    "llama+adp-waists": (linear_adp, {"rank_pattern": {"up_proj": 7}, "scaling": 0.4}),
    "gpt2+adp": (linear_adp, {"bias": "adapter_only", "adapter_dropout": 0.1}),
    "gpt2+adp-dense": (linear_adp, {"tensorized": False, "bottleneck_size": 6, "use_adapterp": True}),
    "roberta+adp": (linear_adp, {"use_parallel_adapter": True}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Logits and adapted modules of the model, and of its export in a process without loretta, per case."""
    root, cases = tmp_path_factory.mktemp("export"), []
    for case, (make, fields) in CASES.items():
        model_type = case.split("+")[0]
        folder, task = root / case, usual_task(model_type)
        base = tiny_model(model_type)
        base.save_pretrained(folder / "base")
        model = get_peft_model(base, make(task_type=task, init_weights=False, **fields))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "cores" not in name:
                nn.init.normal_(parameter, std=0.5)
        model.eval()
        export_lora(model, folder / "lora")
        adapted = [name for name, module in model.named_modules() if isinstance(module, LorettaLayer)]
        torch.save((tiny_logits(model, task), adapted), folder / "ours.pt")
        cases.append(str(folder))
    run_fresh("tests.layers.stock_cases", cases)
    return root


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_sees_the_same_logits(exported, case: str) -> None:
    (ours, adapted), (stock, adapted_by_stock) = (
        torch.load(exported / case / f"{kind}.pt") for kind in ("ours", "stock")
    )
    torch.testing.assert_close(stock, ours)
    assert adapted_by_stock == adapted


@pytest.mark.parametrize("case", [case for case in CASES if "adp" in case])
def test_the_rank_of_a_linear_adp_adapter_is_at_most_its_waist(exported, case: str) -> None:
    config = json.loads((exported / case / "lora" / "adapter_config.json").read_text())
    waist = {"llama+adp-waists": 7, "gpt2+adp-dense": 6}.get(case, 5)
    assert (config["r"], config["lora_alpha"]) == (waist, waist)
    assert config["lora_bias"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    weights = load_file(exported / case / "lora" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in weights.items() if "lora_A" in name} == {waist}


def test_an_adp_adapter_that_adds_no_constant_needs_no_bias(tmp_path) -> None:
    config = LorettaAdpConfig(task_type="CAUSAL_LM", non_linearity="identity", init_weights="gaussian")
    export_lora(get_peft_model(tiny_model("llama"), config), tmp_path)
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["lora_bias"]


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path) -> None:
    adp = get_peft_model(tiny_model("llama"), LorettaAdpConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="LorettaAdpModel with 'relu'"):
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
