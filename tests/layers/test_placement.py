"""What is adapted, where the adapter sits, and what each linear's geometry demands."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.adp import LorettaAdpLinear
from loretta.rep import LorettaRepLinear
from loretta.targets import FAMILIES, Family
from loretta_kernels import reference
from tests.tiny_models import HIDDEN, tiny_batch, tiny_model


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def placements(model) -> dict[str, str]:
    return {
        name.split("layers.0.")[-1]: module.placement["default"]
        for name, module in model.named_modules()
        if isinstance(module, LorettaAdpLinear) and "layers.0." in name
    }


def definition(layer: LorettaAdpLinear, x: torch.Tensor) -> torch.Tensor:
    """adapter(x), by the reference."""
    down, up = layer.loretta_adp_down["default"], layer.loretta_adp_up["default"]
    scale = layer.scaling.get("default") or layer.loretta_adp_scaling["default"].value
    return reference.tt_adapter(x, down.tt, up.tt, activation=layer.activation["default"], scale=scale)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"mlp.gate_proj": "mh_adapter", "mlp.up_proj": "mh_adapter", "mlp.down_proj": "output_adapter"}),
        ({"use_adapterp": True}, {"mlp.down_proj": "output_adapter"}),
        (
            {"use_parallel_adapter": True},
            dict.fromkeys(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], "parallel_adapter"),
        ),
        (
            {"target_modules": ["up_proj", "o_proj"]},
            {"mlp.up_proj": "mh_adapter", "self_attn.o_proj": "output_adapter"},
        ),
        ({"target_modules": ["o_proj"], "adapter_type": "mh_adapter"}, {"self_attn.o_proj": "mh_adapter"}),
        (
            {"target_modules": ["q_proj", "up_proj"], "adapter_type": {"q_proj": "mh_adapter"}},
            {"self_attn.q_proj": "mh_adapter", "mlp.up_proj": "mh_adapter"},
        ),
    ],
    ids=["paper", "adapterp", "parallel", "explicit-known-and-unknown", "one-placement", "by-name"],
)
def test_adapters_sit_where_the_config_says(fields, expected) -> None:
    model = get_peft_model(tiny_model("llama"), LorettaAdpConfig(task_type="CAUSAL_LM", **fields))
    assert placements(model) == expected
    model(**tiny_batch("CAUSAL_LM")).loss.backward()


@pytest.mark.parametrize("exclude", [None, ["encoder.layer.1.output.dense"], r".*layer\.1\.output\.dense"])
def test_adapterp_leaves_the_attention_output_of_bert_alone(exclude) -> None:
    config = LorettaAdpConfig(task_type="SEQ_CLS", use_adapterp=True, exclude_modules=exclude)
    model = get_peft_model(tiny_model("bert"), config)
    names = [name for name, module in model.named_modules() if isinstance(module, LorettaAdpLinear)]
    assert [name.split("encoder.")[1] for name in names] == ["layer.0.output.dense", "layer.1.output.dense"][
        : 1 if exclude else 2
    ]


def test_each_placement_computes_its_formula() -> None:
    x = torch.randn(3, 5, 12)
    for fields, formula in [
        ({"adapter_type": "mh_adapter"}, lambda layer, base: base(x + definition(layer, x))),
        ({"adapter_type": "output_adapter"}, lambda layer, base: base(x) + definition(layer, base(x))),
        ({"use_parallel_adapter": True}, lambda layer, base: base(x) + definition(layer, x)),
        ({"scaling": 0.3}, lambda layer, base: base(x) + definition(layer, base(x))),
        ({"scaling": "learned"}, lambda layer, base: base(x) + definition(layer, base(x))),
    ]:
        config = LorettaAdpConfig(
            target_modules=["first"], bottleneck_size=6, init_weights=False, non_linearity="gelu", **fields
        )
        model = get_peft_model(TwoLinears(), config)
        layer = model.base_model.model.first
        torch.testing.assert_close(layer(x), formula(layer, layer.base_layer))


def test_a_dense_bottleneck_is_the_textbook_adapter() -> None:
    x = torch.randn(3, 12)
    config = LorettaAdpConfig(target_modules=["first"], tensorized=False, bottleneck_size=6, init_weights=False)
    layer = get_peft_model(TwoLinears(), config).base_model.model.first
    down, up = layer.loretta_adp_down["default"], layer.loretta_adp_up["default"]
    assert down.weight.shape == (6, 20)
    z = layer.base_layer(x)
    expected = z + torch.relu(z @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), expected)


def test_a_learned_scaling_is_trained_and_a_number_is_not() -> None:
    model = get_peft_model(TwoLinears(), LorettaAdpConfig(target_modules=["first"], scaling="learned"))
    layer = model.base_model.model.first
    assert layer.loretta_adp_scaling["default"].value.requires_grad
    nn.init.normal_(layer.loretta_adp_up["default"].cores)
    model(torch.randn(3, 12)).sum().backward()
    assert layer.loretta_adp_scaling["default"].value.grad.abs() > 0
    fixed = get_peft_model(TwoLinears(), LorettaAdpConfig(target_modules=["first"], scaling=2))
    assert "scaling" not in "".join(fixed.state_dict())


def test_rep_computes_its_formula_for_linear_and_conv1d_and_merges_into_both() -> None:
    x = torch.randn(4, 12)
    for base in (nn.Linear(12, 18), Conv1D(18, 12)):
        model = get_peft_model(
            nn.Sequential(base), LorettaRepConfig(target_modules=["0"], r=4, lora_alpha=6, init_weights=False)
        ).eval()
        layer = model.base_model.model[0]
        a, b = layer.factors("default")
        expected = base(x) + 1.5 * x @ a @ b
        torch.testing.assert_close(layer(x), expected)
        merged = model.merge_and_unload()[0]
        assert type(merged) is type(base)
        torch.testing.assert_close(merged(x), expected)


def test_grouped_query_attention_gets_factors_of_its_own_widths() -> None:
    config = LorettaRepConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(tiny_model("llama"), config)
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.loretta_rep_B["default"].out_features == HIDDEN
    assert attention.v_proj.loretta_rep_B["default"].out_features == HIDDEN // 2
    model(**tiny_batch("CAUSAL_LM")).loss.backward()


def test_enable_lora_adapts_only_the_enabled_slices_of_a_fused_projection() -> None:
    x = torch.randn(2, 7, HIDDEN)
    config = LorettaRepConfig(task_type="CAUSAL_LM", enable_lora=[True, False, True], init_weights=False)
    model = get_peft_model(tiny_model("gpt2"), config).eval()
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert isinstance(layer, LorettaRepLinear)
    assert layer.loretta_rep_B["default"].out_features == 2 * HIDDEN
    q, k, v = (layer(x) - layer.base_layer(x)).chunk(3, -1)
    assert q.abs().max() > 1e-3
    assert v.abs().max() > 1e-3
    assert not k.any()
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)


def test_enable_lora_names_an_output_it_cannot_slice() -> None:
    with pytest.raises(ValueError, match="3 slices, which do not divide the 20 outputs"):
        get_peft_model(TwoLinears(), LorettaRepConfig(target_modules=["first"], enable_lora=[True] * 3))


def test_patterns_override_r_alpha_and_the_ranks_of_bonds_by_name() -> None:
    config = LorettaRepConfig(
        target_modules=["first", "second"],
        rank_pattern={"second": 3},
        alpha_pattern={"first": 4},
        tensor_rank_pattern={"first": 2},
    )
    model = get_peft_model(TwoLinears(), config).base_model.model
    assert (model.first.r["default"], model.first.scaling["default"]) == (8, 0.5)
    assert (model.second.r["default"], model.second.scaling["default"]) == (3, 16 / 3)
    assert max(model.first.loretta_rep_A["default"].shape.bond_ranks) == 2
    assert max(model.second.loretta_rep_A["default"].shape.bond_ranks) == 5
    adp = LorettaAdpConfig(target_modules=["first", "second"], tensor_rank_pattern={"sec.*": 2})
    model = get_peft_model(TwoLinears(), adp).base_model.model
    assert model.first.loretta_adp_down["default"].shape.waist == 5
    assert model.second.loretta_adp_down["default"].shape.waist == 2


@pytest.mark.parametrize("config_class", [LorettaAdpConfig, LorettaRepConfig])
def test_a_rank_of_bonds_for_no_module_is_named(config_class) -> None:
    config = config_class(target_modules=["first"], tensor_rank_pattern={"second": 2, "first": 3})
    with pytest.warns(RuntimeWarning, match=r"tensor_rank_pattern: \['second'\] did not match"):
        get_peft_model(TwoLinears(), config)


def test_an_adapter_saved_with_its_bond_ranks_called_rank_pattern_loads_with_the_same_shapes(tmp_path) -> None:
    config = LorettaAdpConfig(target_modules=["first", "second"], tensor_rank_pattern={"second": 2}, init_weights=False)
    model, x = get_peft_model(TwoLinears(), config).eval(), torch.randn(3, 12)
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields["rank_pattern"] = fields.pop("tensor_rank_pattern")
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.warns(FutureWarning, match=r"tensor_rank_pattern.*\{'second': 2\}"):
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (again["tensor_rank_pattern"], again["rank_pattern"]) == ({"second": 2}, {})


def test_explicit_modes_are_used_and_others_keep_the_default() -> None:
    config = LorettaRepConfig(target_modules=["first"], tensor_shape={20: [2, 10], 12: [6, 2]})
    layer = get_peft_model(TwoLinears(), config).base_model.model.first
    a, b = layer.loretta_rep_A["default"].shape, layer.loretta_rep_B["default"].shape
    assert (a.in_modes, a.out_modes) == ((6, 2), (8,))
    assert (b.in_modes, b.out_modes) == ((8,), (2, 10))


def test_layers_to_transform_picks_layers_with_default_targets() -> None:
    config = LorettaAdpConfig(task_type="CAUSAL_LM", layers_to_transform=[1])
    model = get_peft_model(tiny_model("llama"), config)
    names = [name for name, module in model.named_modules() if isinstance(module, LorettaAdpLinear)]
    assert len(names) == 3
    assert all("layers.1." in name for name in names)


@pytest.mark.parametrize("size", [1, 2, 5, 13, 24, 32, 61, 96])
def test_any_bottleneck_and_any_hidden_size(size: int) -> None:
    base = nn.Sequential(nn.Linear(size, 1601), nn.Linear(1601, size))
    for config in (
        LorettaAdpConfig(target_modules=["0", "1"], bottleneck_size=size),
        LorettaRepConfig(target_modules=["0", "1"], r=size),
    ):
        model = get_peft_model(
            nn.Sequential(*[nn.Linear(layer.in_features, layer.out_features) for layer in base]), config
        )
        assert model(torch.randn(2, size)).shape == (2, size)


def test_an_unknown_model_says_that_it_needs_targets_and_an_unsupported_layer_is_named() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(TwoLinears(), LorettaAdpConfig())
    with pytest.raises(ValueError, match=r"'0'.*Conv2d"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 1)), LorettaRepConfig(target_modules=["0"]))


def test_adapterp_needs_a_family_whose_feed_forward_exit_is_known(monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", Family(("q_proj",), ("gate_proj",)))
    with pytest.raises(ValueError, match="'llama' is known"):
        get_peft_model(tiny_model("llama"), LorettaAdpConfig(use_adapterp=True))
