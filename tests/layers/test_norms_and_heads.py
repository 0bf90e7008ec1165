"""The modules that are trained whole: LayerNorms by class, and the tensorised classification head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.norms import is_feature_norm, norm_names
from loretta.targets import FAMILIES
from loretta.tensor_train import TensorTrain
from tests.tiny_models import _SIZES, tiny_batch, tiny_model, usual_task

HEADS = {name: family.head for name, family in FAMILIES.items() if family.head}


class SomeRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaler = nn.LayerNorm(4)
        self.renorm = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"norm": SomeRMSNorm(), "batch_norm": nn.BatchNorm1d(4), "fc": nn.Linear(4, 4)})
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
        self.plain = nn.LayerNorm(4, elementwise_affine=False)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])  # so that "0" would bar a linear from being adapted


def test_norms_are_found_by_class_and_names_select_only_them() -> None:
    model = Mixed()
    assert norm_names(model, None) == ["scaler", "block.norm", "head.0"]
    assert norm_names(model, ["head"]) == ["scaler", "block.norm"]
    assert not is_feature_norm(model.plain)


@pytest.mark.parametrize("model_type", _SIZES)
def test_every_norm_of_every_family_is_trained_and_nothing_else_is(model_type: str) -> None:
    base = tiny_model(model_type)
    norms = {name for name, module in base.named_modules() if is_feature_norm(module)}
    called_norm = {
        name
        for name, module in base.named_modules()
        if "norm" in type(module).__name__.lower() and list(module.parameters())
    }
    assert norms == called_norm
    model = get_peft_model(base, LorettaRepConfig(task_type=usual_task(model_type), tensorize_head=False))
    trained = {
        name.split(".modules_to_save.")[0].removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "modules_to_save" in name
    }
    assert {name for name in trained if "classifier" not in name and name != "score"} == norms


@pytest.mark.parametrize("config_class", [LorettaAdpConfig, LorettaRepConfig])
def test_norms_stay_frozen_on_request(config_class) -> None:
    model = get_peft_model(tiny_model("opt"), config_class(task_type="CAUSAL_LM", train_layernorm=False))
    assert all("loretta" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("model_type", HEADS)
def test_the_head_is_a_train_in_the_adapters_copy_only(model_type: str) -> None:
    config = LorettaRepConfig(task_type="SEQ_CLS", tensor_rank=3)
    base = tiny_model(model_type, "SEQ_CLS")
    model = get_peft_model(base, config)
    trains = {name: module for name, module in model.named_modules() if isinstance(module, TensorTrain)}
    heads = [name for name in trains if "modules_to_save" in name]
    head, dense = HEADS[model_type].split(".")
    assert [name.split(f"{head}.")[-1] for name in heads] == [f"modules_to_save.default.{dense}"]
    copies = [name for name, module in model.named_modules() if name.endswith(f"{head}.original_module.{dense}")]
    assert [type(model.get_submodule(name)) for name in copies] == [nn.Linear]
    model.train()
    model(**tiny_batch("SEQ_CLS")).loss.backward()
    assert trains[heads[0]].cores.grad.any()
    assert trains[heads[0]].bias.grad.any()

    plain = get_peft_model(
        tiny_model(model_type, "SEQ_CLS"), LorettaRepConfig(task_type="SEQ_CLS", tensorize_head=False)
    )
    assert not any(
        "modules_to_save" in name for name, module in plain.named_modules() if isinstance(module, TensorTrain)
    )


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("config_class", [LorettaAdpConfig, LorettaRepConfig])
def test_every_task_type_trains_and_reloads(config_class, task: str, tmp_path) -> None:
    from peft import PeftModel

    from tests.tiny_models import AUTO_CLASSES

    model_type = "llama" if task == "CAUSAL_LM" else "bert"
    model = get_peft_model(tiny_model(model_type, task), config_class(task_type=task, init_weights=False))
    batch = tiny_batch(task)
    output = model(**batch)
    (output.loss if task != "FEATURE_EXTRACTION" else output.last_hidden_state.sum()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "loretta" in name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_type, task), tmp_path)
    assert type(loaded) is type(model)
    assert isinstance(loaded.get_base_model(), type(AUTO_CLASSES[task].from_config(loaded.get_base_model().config)))
    with torch.no_grad():
        got, expected = loaded.eval()(**batch), model.eval()(**batch)
    assert all(
        torch.equal(a, b) for a, b in zip(got.to_tuple(), expected.to_tuple(), strict=True) if torch.is_tensor(a)
    )
