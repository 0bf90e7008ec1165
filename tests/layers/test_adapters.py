"""Merging, several adapters, mixed batches, unloading: what PEFT's users do with adapters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta._versions import LOAD_ADAPTER_DROPS_MODULES
from tests.tiny_models import tiny_batch, tiny_model

TASK = "CAUSAL_LM"


def rep(**fields) -> LorettaRepConfig:
    return LorettaRepConfig(**{"task_type": TASK, "init_weights": False, "lora_dropout": 0.0, **fields})


def adp(**fields) -> LorettaAdpConfig:
    return LorettaAdpConfig(**{"task_type": TASK, "init_weights": False, **fields})


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batch(TASK)["input_ids"], **kwargs).logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merging_and_unmerging_rep_keep_the_function(model_type: str) -> None:
    model = get_peft_model(tiny_model(model_type), rep()).eval()
    adapted = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("loretta" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), adapted)


def trained(model):
    """Everything trainable drawn at random, as if it had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_a_plain_one_with_the_trained_norms_and_head(dtype, tmp_path) -> None:
    base = tiny_model("roberta").to(dtype)
    keys = base.state_dict().keys()
    model = trained(get_peft_model(base, rep(task_type="SEQ_CLS")))
    adapted = logits(model)
    merged = model.merge_and_unload()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(logits(merged), adapted, rtol=tolerance, atol=tolerance)
    assert merged.state_dict().keys() == keys
    merged.save_pretrained(tmp_path)
    reloaded = type(base).from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager").eval()
    assert torch.equal(logits(reloaded), logits(merged))


@pytest.mark.parametrize("model_type", ["llama", "roberta", "deberta"])
def test_unloading_gives_the_base_back_with_its_norms_and_head(model_type: str) -> None:
    task = "CAUSAL_LM" if model_type == "llama" else "SEQ_CLS"
    for config in (rep, adp):
        base = tiny_model(model_type)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        unloaded = trained(get_peft_model(base, config(task_type=task))).unload()
        after = unloaded.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_weight_alone() -> None:
    model = get_peft_model(tiny_model("llama"), rep())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.loretta_rep_A["default"].cores[0] = float("nan")
    with pytest.raises(ValueError, match="broken"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_merge_weights_merges_in_eval_and_unmerges_in_training() -> None:
    model = get_peft_model(tiny_model("llama"), rep(merge_weights=True)).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before, unmerged = layer.base_layer.weight.clone(), logits(model)
    model.eval()
    assert layer.merged
    torch.testing.assert_close(logits(model), unmerged)
    model.train()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight, before)


def test_merging_adp_raises_and_says_why() -> None:
    model = trained(get_peft_model(tiny_model("llama"), adp()))
    adapted = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="nonlinearity"):
            merge()
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("config", [rep, adp])
def test_adapters_switch_add_up_and_are_deleted(config) -> None:
    model = get_peft_model(tiny_model("llama"), config(train_layernorm=False), adapter_name="a").eval()
    model.add_adapter("b", config(train_layernorm=False))
    with model.disable_adapter():
        base = logits(model)
    alone_a = logits(model)
    model.set_adapter("b")
    alone_b = logits(model)
    assert not torch.allclose(alone_a, alone_b)
    trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"b"}
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    assert not any(torch.allclose(both, other) for other in (base, alone_a, alone_b))
    model.set_adapter("b")
    model.delete_adapter("a")
    assert not any(".a." in name for name in model.state_dict())
    assert torch.equal(logits(model), alone_b)


@pytest.mark.parametrize("config", [rep, adp])
def test_a_mixed_batch_gives_each_row_its_adapter(config) -> None:
    model = get_peft_model(tiny_model("llama"), config(train_layernorm=False), adapter_name="a").eval()
    model.add_adapter("b", config(train_layernorm=False))
    ids = torch.randint(3, 60, (5, 6))
    names = ["b", "__base__", "a", "b", "a"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone)


def test_a_mixed_batch_names_what_is_wrong() -> None:
    model = get_peft_model(tiny_model("llama"), rep(train_layernorm=False))
    ids = tiny_batch(TASK)["input_ids"]
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=ids, adapter_names=["default", "default"])
    with pytest.raises(ValueError, match=r"c; there are \['default'\]"):
        model.eval()(input_ids=ids, adapter_names=["default", "c"])
    with pytest.raises(ValueError, match="3 names and 2 inputs"):
        model(input_ids=ids, adapter_names=["default"] * 3)


@pytest.mark.parametrize("config", [rep, adp])
def test_a_second_adapter_trains_its_own_norms(config) -> None:
    model = get_peft_model(tiny_model("llama"), config(), adapter_name="a")
    model.add_adapter("b", config())
    model.set_adapter("b")
    norms = [name for name, p in model.named_parameters() if p.requires_grad and "norm" in name]
    assert len(norms) == 5
    assert all("modules_to_save.b." in name for name in norms)


@pytest.mark.parametrize(
    "config", [rep(lora_dropout=0.5), adp(adapter_dropout=0.5), adp(adapter_dropout=0.5, tensorized=False)]
)
def test_dropout_is_random_in_training_and_absent_in_eval(config) -> None:
    model = get_peft_model(tiny_model("llama"), config)
    torch.manual_seed(5)
    first = logits(model.train())
    assert not torch.equal(logits(model), first)
    torch.manual_seed(5)
    assert torch.equal(logits(model), first)
    steady = logits(model.eval())
    assert torch.equal(logits(model), steady)
    assert not torch.allclose(steady, first)


@pytest.mark.parametrize("config", [rep, adp])
def test_an_exception_inside_disable_adapter_leaves_the_adapter_on(config) -> None:
    model = get_peft_model(tiny_model("llama"), config()).eval()
    adapted = logits(model)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), adapted)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("config", [rep, adp])
def test_a_model_pickles_and_copies(config) -> None:
    model = get_peft_model(tiny_model("llama"), config()).eval()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("config", [rep, adp])
def test_one_config_serves_several_models_unchanged(config) -> None:
    shared = config(task_type=TASK)
    first = get_peft_model(tiny_model("llama"), shared)
    assert shared.target_modules is None
    assert shared.modules_to_save is None
    second = get_peft_model(tiny_model("gpt2"), shared)
    assert set(first.peft_config["default"].modules_to_save) == {"input_layernorm", "post_attention_layernorm", "norm"}
    assert set(second.peft_config["default"].modules_to_save) == {"ln_1", "ln_2", "ln_f"}


@pytest.mark.parametrize("config", [rep, adp])
def test_adapters_load_beside_each_other_and_on_the_meta_device(config, tmp_path) -> None:
    model = get_peft_model(tiny_model("llama"), config()).eval()
    model.save_pretrained(tmp_path / "one")
    expected = logits(model)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_model("llama"), tmp_path / "one", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(loaded), expected)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.load_adapter(tmp_path / "one", adapter_name="two")
    loaded.set_adapter("two")
    assert torch.equal(logits(loaded), expected)
    if not LOAD_ADAPTER_DROPS_MODULES:
        plain = tiny_model("llama")
        plain.load_adapter(str(tmp_path / "one"))
        assert torch.equal(logits(plain), expected)
