"""What would silently train nothing or change the base is prevented or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loretta import LorettaRepConfig, PeftModel, get_peft_model
from loretta.quantised import keep_unpacked
from tests.tiny_models import tiny_logits

from .bases import CONFIGS, WEIGHTS_ONLY, gradients, load, save_llama, torchao, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bitsandbytes on a CPU that makes it repack weights, whatever this one is."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    return modules


def is_packed(model: nn.Module) -> bool:
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("method", CONFIGS)
def test_wrapping_keeps_bitsandbytes_from_repacking(method: str, folder: Path, avx512_bf16: Any, tmp_path) -> None:
    base = load(folder, WEIGHTS_ONLY["nf4"]())
    assert base.model.layers[0].mlp.down_proj.support_avx512bf16_for_cpu
    model = get_peft_model(base, CONFIGS[method]).eval()
    tiny_logits(model, "CAUSAL_LM")
    assert not is_packed(model)
    assert gradients(model).keys() == trained(model).keys()
    model.save_pretrained(tmp_path)

    for_inference = PeftModel.from_pretrained(load(folder, WEIGHTS_ONLY["nf4"]()), tmp_path)
    tiny_logits(for_inference, "CAUSAL_LM")
    assert not is_packed(for_inference)


def test_a_base_that_is_evaluated_first_can_be_kept_unpacked(folder: Path, avx512_bf16: Any) -> None:
    base = load(folder, WEIGHTS_ONLY["nf4"]())
    keep_unpacked(base)
    tiny_logits(base, "CAUSAL_LM")
    assert not is_packed(base)
    get_peft_model(base, CONFIGS["rep"])


def test_a_repacked_base_is_refused(folder: Path, avx512_bf16: Any) -> None:
    base = load(folder, WEIGHTS_ONLY["nf4"]())
    layer = base.model.layers[1].self_attn.q_proj
    pack = avx512_bf16._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    with pytest.raises(
        ValueError, match=r"repacked 1 4-bit layers .*'model\.layers\.1\.self_attn\.q_proj'.* no gradient"
    ):
        get_peft_model(base, CONFIGS["rep"])


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_a_base_that_rounds_its_activations_is_refused_for_training_alone(
    name: str, method: str, folder: Path, tmp_path: Path
) -> None:
    dynamic = load(folder, torchao(name))
    with pytest.raises(ValueError, match=r"14 layers of the base, such as .*q_proj', quantise"):
        get_peft_model(dynamic, CONFIGS[method])
    get_peft_model(load(folder, WEIGHTS_ONLY["torchao-int8"]()), CONFIGS[method]).save_pretrained(tmp_path)
    for_inference = PeftModel.from_pretrained(load(folder, torchao(name)), tmp_path)
    assert tiny_logits(for_inference, "CAUSAL_LM").isfinite().all()


def test_torchs_own_dynamic_modules_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    dynamic = torch.ao.quantization.quantize_dynamic(model, {"1"}, torch.qint8)
    with pytest.raises(ValueError, match="1 layers of the base, such as '1', quantise their inputs"):
        get_peft_model(dynamic, LorettaRepConfig(target_modules=["0"], train_layernorm=False))
