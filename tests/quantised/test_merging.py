"""A merge into a quantised base is PEFT's: the weight is dequantised, the delta added, the sum quantised again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.quantised import keep_unpacked
from tests.tiny_models import tiny_batch, tiny_logits, tiny_model

from .bases import CONFIGS, WEIGHTS_ONLY, base_weights, load, quantised_layers, save_llama, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def quantised_again(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """What a weight stands for after one quantisation of that kind."""
    if kind.startswith("torchao"):
        from torchao.quantization import quantize_

        linear = nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(linear, WEIGHTS_ONLY[kind]().quant_type)
        return linear.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit

    if kind == "int8":
        codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return int8_vectorwise_dequant(codes, scale)
    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=kind == "nf4-double"))


@pytest.mark.parametrize("kind", WEIGHTS_ONLY)
def test_the_merged_weight_is_the_quantised_sum(kind: str, folder: Path) -> None:
    model = get_peft_model(load(folder, WEIGHTS_ONLY[kind]()), CONFIGS["rep"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight, delta = layer.get_base_weight().clone(), layer.get_delta_weight("default")
    assert delta.abs().max() > 0.1 * weight.abs().max()
    adapted = tiny_logits(model, "CAUSAL_LM")

    merged = model.merge_and_unload(safe_merge=True)
    layers = quantised_layers(merged)
    found, backend = layers["model.layers.0.self_attn.q_proj"]
    assert len(layers) == 14
    torch.testing.assert_close(backend.get_base_weight(found).float(), quantised_again(kind, weight + delta).float())
    error = (tiny_logits(merged, "CAUSAL_LM") - adapted).norm() / adapted.norm()
    assert error < (0.02 if "int8" in kind else 0.3)  # of quantising again


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", WEIGHTS_ONLY)
def test_unmerging_gives_the_quantised_base_back_bit_by_bit(kind: str, method: str, folder: Path) -> None:
    config = copy.deepcopy(CONFIGS[method])
    if method == "adp":
        config.non_linearity = "identity"
    model = get_peft_model(load(folder, WEIGHTS_ONLY[kind]()), config).eval()
    adapted, before = tiny_logits(model, "CAUSAL_LM"), base_weights(model)
    for _ in range(2):
        model.merge_adapter()
        assert not torch.equal(tiny_logits(model, "CAUSAL_LM"), adapted)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.mul_(1.5).div_(1.5)
        model.unmerge_adapter()
    after = base_weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with model.disable_adapter():
        bare = tiny_logits(model, "CAUSAL_LM")
    model.merge_adapter()
    keep_unpacked(expected := load(folder, WEIGHTS_ONLY[kind]()))
    assert torch.equal(bare, tiny_logits(expected, "CAUSAL_LM"))
    assert torch.equal(tiny_logits(model.unload(), "CAUSAL_LM"), bare)


def test_an_adp_adapter_is_refused_as_on_any_base(folder: Path) -> None:
    model = get_peft_model(load(folder, WEIGHTS_ONLY["nf4"]()), CONFIGS["adp"])
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


def classifier(folder: Path, bits: int, skip: list[str] | None) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=skip)
    options = {"quantization_config": config, "device_map": "cpu"}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("config", [LorettaAdpConfig, LorettaRepConfig])
def test_a_tensorised_head_trains_on_a_quantised_base_and_merges(config: Any, bits: int, tmp_path: Path) -> None:
    tiny_model("roberta", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = config(task_type="SEQ_CLS", init_weights=False)
    with pytest.raises(ValueError, match=r"'classifier' .* quantised; .*llm_int8_skip_modules=\['classifier'\]"):
        get_peft_model(classifier(tmp_path, bits, skip=None), config)

    model = get_peft_model(classifier(tmp_path, bits, skip=["classifier"]), config).train()
    model(**tiny_batch("SEQ_CLS")).loss.backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())
    logits = tiny_logits(model.eval(), "SEQ_CLS")
    if isinstance(config, LorettaRepConfig):
        merged = model.merge_and_unload()
        assert merged.classifier.dense.weight.dtype is torch.float32
        assert (tiny_logits(merged, "SEQ_CLS") - logits).abs().max() < 0.2 * logits.abs().max()
    else:
        bare = model.unload()
        assert isinstance(bare.classifier.dense, nn.Linear)
        keep_unpacked(expected := classifier(tmp_path, bits, skip=["classifier"]))
        assert torch.equal(tiny_logits(bare, "SEQ_CLS"), tiny_logits(expected, "SEQ_CLS"))
