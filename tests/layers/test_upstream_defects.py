"""What the released package gets wrong, one test each, where no other file of tests covers it.

Merging, reloading, second adapters, pickling, disabling: test_adapters, test_families. Wrong values: test_config.
Placements, enable_lora, sizes: test_placement. Norms and heads: test_norms_and_heads.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.layer import LorettaLayer
from tests.tiny_models import tiny_batch, tiny_logits, tiny_model

CONFIGS = {"adp": LorettaAdpConfig, "rep": LorettaRepConfig}
both_methods = pytest.mark.parametrize("config_class", CONFIGS.values(), ids=CONFIGS)


@both_methods
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("opt", {}), ("llama", {"tie_word_embeddings": True}), ("roberta", {"is_decoder": True})],
)
def test_only_adapters_and_norms_are_trainable(config_class, model_type: str, overrides) -> None:
    model = get_peft_model(tiny_model(model_type, "CAUSAL_LM", **overrides), config_class(task_type="CAUSAL_LM"))
    strangers = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".loretta_" not in name and "norm" not in name.lower()
    ]
    assert strangers == []
    assert any("norm" in name.lower() for name, parameter in model.named_parameters() if parameter.requires_grad)


@both_methods
def test_the_defaults_work_as_they_stand(config_class) -> None:
    model = get_peft_model(tiny_model("llama"), config_class())
    model(**tiny_batch("CAUSAL_LM")).loss.backward()


def test_a_single_target_stays_what_it_is() -> None:
    model = get_peft_model(tiny_model("llama"), LorettaRepConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    names = [name for name, module in model.named_modules() if isinstance(module, LorettaLayer)]
    assert [name.split(".")[-1] for name in names] == ["q_proj", "q_proj"]
    assert names[0].endswith("layers.0.self_attn.q_proj")


@both_methods
@pytest.mark.parametrize(
    "hidden", [576, 768, 896, 1024, 1280, 1536, 1600, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 8192]
)
@pytest.mark.parametrize("width", [5, 8, 16, 32, 64, 128])
def test_hidden_sizes_and_bottlenecks_all_work(config_class, hidden: int, width: int) -> None:
    field = {LorettaAdpConfig: "bottleneck_size", LorettaRepConfig: "r"}[config_class]
    with torch.device("meta"):
        base = nn.ModuleDict({"fc": nn.Linear(hidden, hidden)})
    layer = get_peft_model(base, config_class(target_modules=["fc"], **{field: width})).base_model.model["fc"]
    assert layer(torch.empty(2, hidden, device="meta")).shape == (2, hidden)


@both_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases_train_on_the_cpu_with_fp32_cores(config_class, dtype) -> None:
    base = nn.Sequential(nn.Linear(24, 24)).to(dtype)
    model = get_peft_model(base, config_class(target_modules=["0"], init_weights=False))
    y = model(torch.randn(5, 24, dtype=dtype))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


@both_methods
def test_cpu_autocast_trains(config_class) -> None:
    model = get_peft_model(tiny_model("llama"), config_class(task_type="CAUSAL_LM", init_weights=False))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tiny_batch("CAUSAL_LM")).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@both_methods
def test_eval_returns_the_layer_and_nothing_is_printed(config_class, capsys) -> None:
    model = get_peft_model(tiny_model("llama"), config_class(task_type="CAUSAL_LM"))
    layer = next(module for module in model.modules() if isinstance(module, LorettaLayer))
    assert layer.eval() is layer
    assert layer.train() is layer
    tiny_logits(model, "CAUSAL_LM")
    assert capsys.readouterr().out == ""
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: ")


@both_methods
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_train_and_give_their_base_back(config_class, bits: int, monkeypatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    # On CPUs with AVX512-BF16 the 4-bit forward without grad repacks the weight in place, and gradients are lost.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False, raising=False)
    linear = nn.Linear(64, 64)
    quantised = bnb.nn.Linear4bit(64, 64) if bits == 4 else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    quantised.load_state_dict(linear.state_dict())
    base = nn.Sequential(quantised.to("cpu"))
    x = torch.randn(3, 64)
    expected = base(x).detach().clone()
    model = get_peft_model(base, config_class(target_modules=["0"], init_weights=False))
    model(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)
    assert not torch.allclose(model(x), expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
