"""Adapters of one configuration at a layer are one call, whether PEFT holds them or stacked tensors do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn

from loretta import AdapterStack, LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.adp import LorettaAdpLinear
from loretta.layer import LorettaLayer
from loretta.rep import LorettaRepLinear
from loretta.stacked import Mixed
from loretta_kernels import Groups
from tests.layers.test_mixed_batches import CASES
from tests.tiny_models import tiny_model

IDS = torch.arange(3, 38).view(7, 5)
INDEX = torch.tensor([2, -1, 0, 1, 0, 2, 2])
NAMES = "wxy"
STACKED = {name: case for name, case in CASES.items() if name != "adp-dense"} | {
    "adp-norms-learned-scaling": ("llama", LorettaAdpConfig, {"train_layernorm": True, "scaling": "learned"}),
    "rep-layer-norms": ("gpt2", LorettaRepConfig, {"train_layernorm": True}),
    "rep-norms-of-heads": ("qwen3", LorettaRepConfig, {"train_layernorm": True}),
}


def several(case: str) -> nn.Module:
    """A model with three adapters of one configuration."""
    family, config_class, fields = STACKED[case]
    fields = {"task_type": "CAUSAL_LM", "init_weights": False, "train_layernorm": False} | fields
    model = get_peft_model(tiny_model(family), config_class(**fields), adapter_name="w")
    for name in "xy":
        model.add_adapter(name, config_class(**fields))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "loretta_" not in name and any(f"modules_to_save.{each}." in name for each in NAMES):
            parameter.data += 0.2 * torch.randn_like(parameter)
        if "scaling" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval()


def stack_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' tensors as a store would stack them."""
    saved = [get_peft_model_state_dict(model, adapter_name=name) for name in NAMES]
    return {key: torch.stack([tensors[key] for tensors in saved]) for key in saved[0]}


@torch.no_grad()
def one_at_a_time(model: nn.Module) -> torch.Tensor:
    """The logits of every row by its adapter alone."""
    alone = []
    for name in NAMES:
        model.set_adapter(name)
        alone.append(model(input_ids=IDS).logits)
    with model.disable_adapter():
        alone.append(model(input_ids=IDS).logits)
    return torch.stack([alone[int(a)][row] for row, a in enumerate(INDEX)])


@pytest.mark.parametrize("case", STACKED)
def test_each_row_gets_its_adapter_of_the_stack(case: str) -> None:
    model = several(case)
    alone = one_at_a_time(model)
    model.set_adapter("w")
    before = model(input_ids=IDS).logits
    stack = AdapterStack(model, stack_of(model))
    assert stack.adapters == 3
    for index in (INDEX, Groups.of(INDEX.int(), 3)):
        with torch.no_grad(), stack.serving(index):
            torch.testing.assert_close(model(input_ids=IDS).logits, alone)
    with torch.no_grad(), stack.serving(INDEX[:, None].expand(7, 5)):  # an adapter for each token
        torch.testing.assert_close(model(input_ids=IDS).logits, alone)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_generates_as_each_adapter_alone() -> None:
    model = several("adp-norms-learned-scaling")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = []
    for row, a in enumerate(INDEX):
        if a >= 0:
            model.set_adapter(NAMES[a])
            alone.append(model.generate(input_ids=IDS[row : row + 1], **options)[0])
        else:
            with model.disable_adapter():
                alone.append(model.generate(input_ids=IDS[row : row + 1], **options)[0])
    with AdapterStack(model, stack_of(model), adapter="w").serving(INDEX):
        assert torch.equal(model.generate(input_ids=IDS, **options), torch.stack(alone))


def test_rows_of_the_stack_may_be_written_to() -> None:
    model = several("rep")
    tensors = stack_of(model)
    stack = AdapterStack(model, tensors, adapter="w")
    with torch.no_grad(), stack.serving(torch.full((7,), 1)):
        before = model(input_ids=IDS).logits
        for tensor in tensors.values():
            tensor.data[1] = tensor[2]  # unseen by version counters
        after = model(input_ids=IDS).logits
    with torch.no_grad(), stack.serving(torch.full((7,), 2)):
        assert torch.equal(model(input_ids=IDS).logits, after)
    assert not torch.equal(before, after)


def test_the_stack_is_trained_in_one_batch() -> None:
    model = several("rep")
    tensors = {key: tensor.requires_grad_() for key, tensor in stack_of(model).items()}
    with AdapterStack(model, tensors, adapter="w").serving(INDEX.clamp(max=1)):
        model(input_ids=IDS).logits.square().sum().backward()
    for key, tensor in tensors.items():
        assert tensor.grad[:2].any(1).all(), key
        assert not tensor.grad[2].any()


def test_after_an_error_the_model_is_as_before() -> None:
    model = several("rep")
    stack = AdapterStack(model, stack_of(model), adapter="w")
    with pytest.raises(KeyError), stack.serving(INDEX):
        raise KeyError
    with stack.serving(INDEX), pytest.raises(ValueError, match="served already"), stack.serving(INDEX):
        pass
    assert all(layer.served is None for layer in model.modules() if isinstance(layer, LorettaLayer))


def test_is_not_served_beside_merged_or_named_adapters() -> None:
    model = several("rep")
    stack = AdapterStack(model, stack_of(model), adapter="w")
    with stack.serving(INDEX), torch.no_grad():
        with pytest.raises(ValueError, match="not with `adapter_names`"):
            model(input_ids=IDS, adapter_names=["w"] * 7)
        model.merge_adapter(["w"])
        with pytest.raises(ValueError, match="nor while adapters are merged"):
            model(input_ids=IDS)


def broken(**changes: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = several("adp-norms-learned-scaling")
    return model, stack_of(model) | changes


NORM = "base_model.model.model.norm.weight"
SCALING = "base_model.model.model.layers.0.mlp.up_proj.loretta_adp_scaling.value"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"no stacked tensor '{NORM}'"),
        ({NORM: torch.ones(32)}, rf"'{NORM}' must be \[adapters, 32\], got \[32\]"),
        ({SCALING: torch.ones(3, 2)}, rf"'{SCALING}' must be \[adapters, 1\], got \[3, 2\]"),
        ({NORM: torch.ones(4, 32)}, f"all tensors must stack as many adapters, got 3 in .* and 4 in '{NORM}'"),
        ({"lm_head.weight": torch.ones(3, 2)}, "1 tensors are of no module of 'w', such as 'lm_head.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    model, tensors = broken(**changes)
    with pytest.raises(ValueError, match=message):
        AdapterStack(model, {key: tensor for key, tensor in tensors.items() if tensor is not None}, adapter="w")


def test_adapters_that_cannot_be_stacked_are_refused() -> None:
    fields = {"task_type": "CAUSAL_LM", "train_layernorm": False}
    model = get_peft_model(tiny_model("llama"), LorettaRepConfig(modules_to_save=["lm_head"], **fields))
    with pytest.raises(ValueError, match="lm_head' is trained whole by 'default': of such modules only norms"):
        AdapterStack(model, {key: tensor[None] for key, tensor in get_peft_model_state_dict(model).items()})
    model = get_peft_model(tiny_model("llama"), LorettaAdpConfig(tensorized=False, **fields))
    with pytest.raises(TypeError, match="the projections of 'default' are no tensor trains, but dense"):
        AdapterStack(model, {})
    model = several("rep")
    with pytest.raises(ValueError, match="the model has no LoRETTA adapter 'q'"):
        AdapterStack(model, {}, adapter="q")
    model.base_model.set_adapter(["w", "x"])
    with pytest.raises(ValueError, match=r"\['w', 'x'\] are active"):
        AdapterStack(model, {})
    with pytest.raises(ValueError, match="index groups 2 adapters, but 3 are stacked"):
        AdapterStack(model, stack_of(model), "w").serving(Groups.of(INDEX.clamp(max=1), 2)).__enter__()


def layer_with(config_class: Any, *configs: dict[str, Any]) -> LorettaLayer:
    """A layer with adapters of these configurations: a, b, ..."""
    layer = (LorettaRepLinear if config_class is LorettaRepConfig else LorettaAdpLinear)(nn.Linear(32, 32)).eval()
    for name, fields in zip("abcd", configs, strict=False):
        layer.add_adapter(name, config_class(init_weights=False, **fields), "key")
    return layer


@pytest.mark.parametrize(
    ("config_class", "one", "other", "together"),
    [
        (LorettaRepConfig, {}, {}, True),
        (LorettaRepConfig, {"r": 4}, {}, False),
        (LorettaRepConfig, {"tensor_rank": 3}, {}, False),
        (LorettaRepConfig, {"lora_alpha": 3}, {}, False),
        (LorettaRepConfig, {"enable_lora": [True, False]}, {}, False),
        (LorettaRepConfig, {"lora_dropout": 0.3}, {}, True),  # nothing is dropped in eval mode
        (LorettaAdpConfig, {}, {}, True),
        (LorettaAdpConfig, {"non_linearity": "tanh"}, {}, False),
        (LorettaAdpConfig, {"scaling": "learned"}, {}, False),
        (LorettaAdpConfig, {"scaling": "learned"}, {"scaling": "learned"}, True),
        (LorettaAdpConfig, {"scaling": 2.0}, {}, False),
        (LorettaAdpConfig, {"tensorized": False}, {"tensorized": False}, False),
    ],
)
def test_adapters_of_one_shape_and_configuration_are_one_call(
    config_class: Any, one: dict[str, Any], other: dict[str, Any], together: bool
) -> None:
    layer, x = layer_with(config_class, one, other), torch.randn(3, 4, 32)
    names = ["b", "a", "b"]
    assert isinstance(layer._acting(x, names), Mixed) is together
    layer.requires_grad_(True)
    mixed = layer(x, adapter_names=names)
    mixed.square().sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if "base_layer" not in name)
    for row, name in enumerate(names):
        layer.set_adapter(name)
        torch.testing.assert_close(mixed[row], layer(x)[row])


def test_what_is_stacked_is_kept_while_the_adapters_are_the_same() -> None:
    layer, x = layer_with(LorettaRepConfig, {}, {}, {}), torch.randn(3, 32)
    names = ["b", "a", "b"]

    def stack() -> torch.Tensor:
        acting = layer._acting(x, names)
        assert isinstance(acting, Mixed)
        return acting.trains.down.cores

    with torch.no_grad():
        first = stack()
        assert stack() is first
        layer.loretta_rep_A["b"].cores.data[0] += 1  # unseen by version counters
        assert torch.equal(stack()[1], layer.loretta_rep_A["b"].cores)
        layer.delete_adapter("b")
        layer.add_adapter("b", LorettaRepConfig(init_weights=False, r=4), "key")
        assert not isinstance(layer._acting(x, names), Mixed)
