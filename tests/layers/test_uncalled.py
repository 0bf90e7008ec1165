"""Modules whose weights a model reads without calling them: refused, left out, made right, or told after a step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, SiglipConfig, SiglipModel

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.layer import LorettaLayer
from tests.tiny_models import tiny_batch, tiny_model

METHODS = pytest.mark.parametrize("config_class", [LorettaAdpConfig, LorettaRepConfig], ids=["adp", "rep"])


def state_space(family: str) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 8}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "mamba2":
        sizes |= {"num_heads": 4, "head_dim": 16, "n_groups": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))


def siglip() -> SiglipModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 61, "max_position_embeddings": 16, "projection_size": 32}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14}))


def adapted(model: nn.Module) -> set[str]:
    return {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, LorettaLayer)}


@METHODS
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("mamba", "out_proj"),
        ("mamba", "conv1d"),
        ("mamba", "dt_proj"),
        ("mamba", "x_proj"),
        ("mamba2", "out_proj"),
        ("mamba2", "conv1d"),
        ("falcon_mamba", "out_proj"),
        ("siglip", "attention.out_proj"),
        ("llama4_text", "router"),
    ],
)
def test_targets_at_which_an_adapter_would_do_nothing_are_refused(family: str, target: str, config_class) -> None:
    base = {"siglip": siglip, "llama4_text": lambda: tiny_model("llama4_text")}.get(family, lambda: state_space(family))
    model = base()
    for targets in ([target], rf".*\.{target}"):
        with pytest.raises(ValueError, match=rf"{target}'"):
            get_peft_model(model, config_class(target_modules=targets))
    assert not adapted(model)


@METHODS
@pytest.mark.parametrize("exclude", [None, ["0.mixer.in_proj"], r".*\.0\.mixer\.in_proj"])
def test_all_linear_leaves_them_out_and_says_so(exclude: Any, config_class) -> None:
    config = config_class(target_modules="all-linear", exclude_modules=exclude)
    with pytest.warns(UserWarning, match=r"all-linear leaves 6 modules out, such as 'backbone\.layers.*MambaMixer"):
        model = get_peft_model(state_space("mamba"), config)
    assert sum(isinstance(module, LorettaLayer) for module in model.modules()) == (1 if exclude else 2)
    assert adapted(model) == {"in_proj"}


def test_all_linear_on_siglip_trains_every_adapter() -> None:
    model = get_peft_model(siglip(), LorettaRepConfig(target_modules="all-linear", init_weights=False)).train()
    model(input_ids=torch.ones(2, 5, dtype=torch.long), pixel_values=torch.randn(2, 3, 28, 28)).logits_per_image[
        0, 0
    ].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_adapter_saved_with_such_a_target_loads_with_a_warning(tmp_path, monkeypatch) -> None:
    config = LorettaRepConfig(target_modules=["dt_proj", "in_proj"], init_weights=False, train_layernorm=False)
    with monkeypatch.context() as patch:
        patch.setattr("loretta.coverage.cannot_be_adapted", lambda model: {})
        get_peft_model(state_space("mamba"), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no adapter can act at .*dt_proj'.*\['mixer\.dt_proj'\]"):
        model = PeftModel.from_pretrained(state_space("mamba"), tmp_path)
    assert adapted(model) == {"dt_proj", "in_proj"}


class Reader(nn.Module):
    """Calls one linear and reads the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 6:
            raise RuntimeError("wrong width")
        return self.called(x) @ self.read.weight


@METHODS
def test_what_is_adapted_but_not_called_is_told_once_after_the_first_training_step(config_class) -> None:
    base = Reader()
    model = get_peft_model(base, config_class(target_modules=["called", "read"]))
    x = torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
    with pytest.warns(UserWarning, match="1 of 2 modules were adapted but not called.*such as 'read'"):
        model(x)
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


@pytest.mark.parametrize("how", ["module", "in-place"])
def test_compiled_parts_are_not_hooked(how: str) -> None:
    base = Reader()
    model = get_peft_model(base, LorettaRepConfig(target_modules=["called", "read"])).train()
    torch._dynamo.reset()
    if how == "module":
        base.called = torch.compile(base.called, fullgraph=True, backend="eager")
    else:
        base.called.compile(fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.randn(2, 6))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_is_told_of_a_model_that_calls_all_or_whose_forward_fails() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(tiny_model("llama"), LorettaAdpConfig(task_type="CAUSAL_LM")).train()
        model(**tiny_batch("CAUSAL_LM"))
        model = get_peft_model(Reader(), LorettaRepConfig(target_modules=["called", "read"])).train()
        with pytest.raises(RuntimeError, match="wrong width"):
            model(torch.randn(2, 7))
        unloaded = get_peft_model(Reader(), LorettaRepConfig(target_modules=["read"])).unload()
        assert not unloaded._forward_pre_hooks


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize(
    "config",
    [
        LorettaAdpConfig(target_modules=["linear1", "linear2"]),
        LorettaAdpConfig(target_modules=["self_attn"]),
        LorettaRepConfig(target_modules=["linear1"], lora_dropout=0.0),
        LorettaRepConfig(target_modules=["layers.0.linear1"], lora_dropout=0.0, train_layernorm=False),
    ],
    ids=["adp", "adp-at-the-attention", "rep", "rep-in-one-layer"],
)
def test_torchs_encoder_layers_compute_in_eval_what_they_compute_in_training(config, padded: bool) -> None:
    model = get_peft_model(encoder(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 5, 12)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 5]) if padded else None
    with torch.no_grad():
        trained = model.train()(x, src_key_padding_mask=mask)
        evaluated = model.eval()(x, src_key_padding_mask=mask)
    if padded:
        trained, evaluated = trained[~mask], evaluated[~mask]
    torch.testing.assert_close(evaluated, trained)


def test_unloading_gives_torchs_encoder_layers_their_fast_path_back() -> None:
    x = torch.randn(3, 5, 12)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 5])
    base = encoder()
    attributes = [dict(module.__dict__) for module in (base, *base.layers)]
    with torch.no_grad():
        expected = base(x, src_key_padding_mask=mask)
        unloaded = get_peft_model(base, LorettaRepConfig(target_modules=["linear1"])).unload()
        assert torch.equal(unloaded(x, src_key_padding_mask=mask), expected)
    for module, before in zip((unloaded, *unloaded.layers), attributes, strict=True):
        assert {name: value for name, value in module.__dict__.items() if not name.startswith("_")} == {
            name: value for name, value in before.items() if not name.startswith("_")
        }
