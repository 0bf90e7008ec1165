"""Merging: what is taken away is what was added, whatever happens in between; linear adp adapters merge too."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.merging import Merging
from tests.tiny_models import tiny_batch, tiny_logits, tiny_model

TASK = "CAUSAL_LM"
CONFIGS = {
    "rep": LorettaRepConfig(task_type=TASK, init_weights=False, lora_dropout=0.0),
    "adp": LorettaAdpConfig(task_type=TASK, init_weights=False, non_linearity="identity"),
}
both_methods = pytest.mark.parametrize("method", CONFIGS)


def wrapped(method: str, dtype: torch.dtype = torch.bfloat16, **fields):
    """A wrapped Llama in eval mode, in sixteen bits, where a sum and a difference do not cancel."""
    config = copy.deepcopy(CONFIGS[method])
    for name, value in fields.items():
        setattr(config, name, value)
    return get_peft_model(tiny_model("llama").to(dtype), config).eval()


def base_weights(model) -> dict[str, torch.Tensor]:
    """A copy of what the base's own linears hold."""
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".base_layer." in name or "embed" in name or "lm_head" in name
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def change_adapters(model, std: float = 0.3) -> None:
    """What an optimiser's steps do to the adapters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loretta" in name:
                parameter.add_(std * torch.randn_like(parameter))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for what sixteen bits of merged weights cannot hold."""
    return bool((found - expected).norm() < 0.05 * expected.norm())


BETWEEN = {
    "nothing": lambda model: None,
    "an-optimiser-step": change_adapters,
    "a-forward": lambda model: tiny_logits(model, TASK),
    "a-step-and-a-forward": lambda model: (change_adapters(model), tiny_logits(model, TASK)),
    "a-second-merge": lambda model: model.merge_adapter(),
    "another-adapter": lambda model: model.add_adapter("other", copy.deepcopy(model.peft_config["default"])),
    "disabling-it": lambda model: (model.base_model.disable_adapter_layers(), tiny_logits(model, TASK)),
}


@both_methods
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_unmerging_gives_the_base_back_bit_by_bit(method: str, between) -> None:
    model = wrapped(method)
    before = base_weights(model)
    model.merge_adapter()
    assert not all(torch.equal(tensor, before[name]) for name, tensor in base_weights(model).items() if name in before)
    between(model)
    model.unmerge_adapter()
    assert_same(base_weights(model), before)


@both_methods
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_unloading_while_merged_gives_the_base_back_bit_by_bit(method: str, between) -> None:
    base = tiny_model("llama").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, copy.deepcopy(CONFIGS[method])).eval()
    model.merge_adapter()
    between(model)
    assert_same(dict(model.unload().state_dict()), before)


@both_methods
def test_a_merged_model_follows_its_adapters(method: str) -> None:
    model = wrapped(method, torch.float32)
    other = copy.deepcopy(model)
    model.merge_adapter()
    for each in (model, other):
        torch.manual_seed(1)
        change_adapters(each)
    torch.testing.assert_close(tiny_logits(model, TASK), tiny_logits(other, TASK), rtol=1e-4, atol=1e-4)


@both_methods
def test_a_merged_model_copies_and_pickles(method: str) -> None:
    model = wrapped(method, torch.float32)
    expected, before = tiny_logits(model, TASK), base_weights(model)
    model.merge_adapter()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(tiny_logits(other, TASK), expected, rtol=1e-4, atol=1e-4)
        other.unmerge_adapter()
        assert_same(base_weights(other), before)


@both_methods
def test_a_base_that_is_cast_while_merged_is_the_cast_base(method: str) -> None:
    model = wrapped(method, torch.float32)
    before = base_weights(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert_same(base_weights(model), {name: tensor.bfloat16() for name, tensor in before.items()})


@both_methods
def test_a_disabled_model_is_the_base_while_merged(method: str) -> None:
    model = wrapped(method)
    with model.disable_adapter():
        base = tiny_logits(model, TASK)
    adapted = tiny_logits(model, TASK)
    model.merge_adapter()
    change_adapters(model, 0.0)
    with model.disable_adapter():
        assert torch.equal(tiny_logits(model, TASK), base)
    assert torch.equal(tiny_logits(model, TASK), adapted)


@both_methods
def test_weights_loaded_into_a_merged_model_are_the_ones_that_count(method: str, tmp_path: Path) -> None:
    model = wrapped(method)
    model.save_pretrained(tmp_path)
    expected, before = tiny_logits(model, TASK), base_weights(model)
    change_adapters(model)
    model.merge_adapter()
    model.load_adapter(tmp_path, "default")
    assert close(tiny_logits(model, TASK), expected)
    model.unmerge_adapter()
    assert torch.equal(tiny_logits(model, TASK), expected)
    assert_same(base_weights(model), before)


@both_methods
def test_a_state_dict_loaded_into_a_merged_model_is_its_base_from_then_on(method: str) -> None:
    model, other = wrapped(method), wrapped(method)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.merge_adapter()
    model.load_state_dict(other.state_dict())
    assert torch.equal(tiny_logits(model, TASK), tiny_logits(other, TASK))
    model.unmerge_adapter()
    assert_same(base_weights(model), base_weights(other))


@both_methods
@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_switching_while_merged_is_exact(method: str, by: str) -> None:
    config = copy.deepcopy(CONFIGS[method])
    config.train_layernorm = False
    plain = tiny_model("llama").to(torch.bfloat16)
    if by == "peft":
        model = get_peft_model(plain, config)
    else:
        model = plain
        model.add_adapter(config, "default")
    model.add_adapter(*(("b", config) if by == "peft" else (config, "b")))
    model.eval().set_adapter("b")
    expected, before = tiny_logits(model, TASK), base_weights(model)
    model.set_adapter("default")
    for module in model.modules():
        if isinstance(module, Merging):
            module.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_adapter("b")
    assert torch.equal(tiny_logits(model, TASK), expected)
    assert_same(base_weights(model), before)


@both_methods
def test_deleting_while_merged_is_refused_by_peft_and_exact_by_transformers(method: str) -> None:
    model = wrapped(method)
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    native = tiny_model("llama").to(torch.bfloat16)
    expected = tiny_logits(native, TASK)
    native.add_adapter(copy.deepcopy(CONFIGS[method]))
    for module in native.modules():
        if isinstance(module, Merging):
            module.merge()
    native.delete_adapter("default")
    assert torch.equal(tiny_logits(native.eval(), TASK), expected)


class Recorder:
    def __init__(self) -> None:
        self.seen = 0

    def note(self, module: nn.Module, args: object, output: object) -> None:
        self.seen += 1


def test_hooks_on_a_base_linear_see_the_merged_one_too() -> None:
    model, recorder = wrapped("rep"), Recorder()
    layer = next(module for module in model.modules() if isinstance(module, Merging))
    layer.base_layer.register_forward_hook(recorder.note)
    tiny_logits(model, TASK)
    model.merge_adapter()
    tiny_logits(model, TASK)
    model.unmerge_adapter()
    tiny_logits(model, TASK)
    assert recorder.seen == 3


def test_two_adapters_merge_one_after_the_other_and_are_both_taken_out() -> None:
    model = wrapped("rep", train_layernorm=False)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    before = base_weights(model)
    model.base_model.set_adapter(["default", "other"])
    expected = tiny_logits(model, TASK)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert close(tiny_logits(model, TASK), expected)
    model.unmerge_adapter()
    assert_same(base_weights(model), before)


def test_a_merge_that_is_refused_changes_nothing() -> None:
    model = wrapped("rep")
    layer = next(module for module in model.modules() if isinstance(module, Merging))
    model.add_adapter("broken", copy.deepcopy(model.peft_config["default"]))
    with torch.no_grad():
        layer.loretta_rep_A["broken"].cores[0] = float("nan")
    model.merge_adapter()
    merged = layer.base_layer
    with pytest.raises(ValueError, match="broken"):
        layer.merge(safe_merge=True, adapter_names=["broken"])
    assert layer.base_layer is merged
    assert layer.merged_adapters == ["default"]


def test_an_adapter_around_another_adapter_is_not_merged() -> None:
    inner = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer = get_peft_model(inner, LorettaRepConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="around another adapter"):
        outer.merge_adapter()


class Worse(TrainerCallback):
    """Trains the adapters away from what they know, so that the first checkpoint is the best."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        change_adapters(model, 0.2)


def test_the_trainer_loads_the_best_checkpoint_of_a_model_that_merges_itself(tmp_path: Path) -> None:
    model = wrapped("rep", torch.float32, merge_weights=True, train_layernorm=False)
    with model.disable_adapter():
        base = tiny_logits(model, TASK)
    before = base_weights(model)
    rows = [{name: tensor[0] for name, tensor in tiny_batch(TASK, batch=1, seed=seed).items()} for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=1e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[Worse()])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)

    best = PeftModel.from_pretrained(tiny_model("llama"), trainer.state.best_model_checkpoint).train(False)
    torch.testing.assert_close(tiny_logits(model, TASK), tiny_logits(best, TASK), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(tiny_logits(model, TASK), base)
    model.train()
    assert_same(base_weights(model), before)


def test_merge_weights_evaluates_the_weights_of_the_moment() -> None:
    model = wrapped("rep", torch.float32, merge_weights=True)
    before = base_weights(model.train())
    for _ in range(2):
        model.eval()
        assert all(module.merged for module in model.modules() if isinstance(module, Merging))
        change_adapters(model)
        merged = tiny_logits(model, TASK)
        model.train()
        assert_same(base_weights(model), before)
        torch.testing.assert_close(merged, tiny_logits(model, TASK), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", [0.3, "learned"])
@pytest.mark.parametrize("tensorized", [True, False], ids=["trains", "dense"])
@pytest.mark.parametrize(
    "placement",
    [{"adapter_type": "mh_adapter"}, {"adapter_type": "output_adapter"}, {"use_parallel_adapter": True}],
    ids=["input", "output", "parallel"],
)
def test_a_linear_adp_adapter_merges_wherever_it_sits(placement, tensorized: bool, scaling) -> None:
    x = torch.randn(5, 12)
    for linear in (nn.Linear(12, 20), nn.Linear(12, 20, bias=False), Conv1D(20, 12)):
        config = LorettaAdpConfig(
            target_modules=["0"], bottleneck_size=6, init_weights=False, non_linearity="linear", tensor_rank=4,
            tensorized=tensorized, scaling=scaling, **placement,
        )  # fmt: skip
        model = get_peft_model(nn.Sequential(linear), config).eval()
        layer = model.base_model.model[0]
        if scaling == "learned":
            nn.init.constant_(layer.loretta_adp_scaling["default"].value, 0.7)
        before, expected = copy.deepcopy(linear.state_dict()), model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        assert_same(dict(layer.base_layer.state_dict()), before)
        merged = model.merge_and_unload()[0]
        assert type(merged) is type(linear)
        torch.testing.assert_close(merged(x), expected)


def test_linear_adp_adapters_of_all_placements_merge_together() -> None:
    x = torch.randn(5, 12)
    options = {"a": {"adapter_type": "mh_adapter"}, "b": {"adapter_type": "output_adapter"}, "c": {}}
    options["c"]["use_parallel_adapter"] = True
    configs = {
        f"{name}{number}": LorettaAdpConfig(
            target_modules=["0"], bottleneck_size=6, init_weights=False, non_linearity="identity", **fields
        )
        for name, fields in options.items()
        for number in range(2)
    }
    first, *rest = configs
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20)), configs[first], adapter_name=first).eval()
    for name in rest:
        model.add_adapter(name, configs[name])
    model.base_model.set_adapter([*configs])
    expected = model(x)
    for order in ([*configs], [*reversed(configs)]):
        model.merge_adapter(order)
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()


def test_adp_adapters_with_a_nonlinearity_are_refused_by_name_alone() -> None:
    model = wrapped("adp", torch.float32, train_layernorm=False)
    model.add_adapter("bent", LorettaAdpConfig(task_type=TASK, init_weights=False, train_layernorm=False))
    before = base_weights(model)
    for names in (["bent"], ["default", "bent"]):
        with pytest.raises(ValueError, match="nonlinearity"):
            model.merge_adapter(names)
        with pytest.raises(ValueError, match="nonlinearity"):
            model.merge_and_unload(adapter_names=names)
    assert_same(base_weights(model), before)
    expected = tiny_logits(model, TASK)
    torch.testing.assert_close(tiny_logits(model.merge_and_unload(), TASK), expected, rtol=1e-4, atol=1e-4)


def test_the_biases_of_a_merged_adapter_are_saved_where_the_model_has_a_place_for_them(tmp_path: Path) -> None:
    model = wrapped("adp", torch.float32, use_adapterp=True)
    expected = tiny_logits(model, TASK)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny_logits(merged, TASK), expected, rtol=1e-4, atol=1e-4)
    assert merged.config.mlp_bias
    assert not merged.config.attention_bias
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(tiny_logits(loaded.eval(), TASK), tiny_logits(merged, TASK))


def test_biases_that_a_saved_model_would_lose_are_told() -> None:
    config = copy.deepcopy(CONFIGS["adp"])
    model = get_peft_model(tiny_model("mistral"), config).eval()
    expected = tiny_logits(model, TASK)
    with pytest.warns(UserWarning, match=r"bias to 6 linears .* MistralForCausalLM cannot say so"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(tiny_logits(merged, TASK), expected, rtol=1e-4, atol=1e-4)
    config.init_weights = True  # adds nothing, so that no linear needs a bias
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="merging gave")
        get_peft_model(tiny_model("mistral"), config).merge_and_unload()


def test_trained_biases_are_saved_without_what_is_merged_into_them(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["adp"])
    config.bias = "adapter_only"
    model = get_peft_model(tiny_model("gpt2"), config).eval()
    expected = tiny_logits(model, TASK)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path).eval()
    assert torch.equal(tiny_logits(reloaded, TASK), expected)
