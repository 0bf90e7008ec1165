"""LoRETTA_adp at whole blocks: where the families place it, what it computes, and that the block stays what it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.block import LorettaAdpBlock
from loretta.layer import LorettaLayer
from loretta.targets import FAMILIES, REP_TARGETS, Family
from tests.layers.test_placement import definition
from tests.tiny_models import HIDDEN, tiny_batch, tiny_logits, tiny_model

TASK = "CAUSAL_LM"
# The classes of a family's two blocks.
BLOCKS = {
    "mixtral": ("mlp", ["MixtralSparseMoeBlock"] * 2),
    "qwen2_moe": ("mlp", ["Qwen2MoeMLP", "Qwen2MoeSparseMoeBlock"]),
    "qwen3_moe": ("mlp", ["Qwen3MoeSparseMoeBlock"] * 2),
    "olmoe": ("mlp", ["OlmoeSparseMoeBlock"] * 2),
    "deepseek_v3": ("mlp", ["DeepseekV3MLP", "DeepseekV3MoE"]),
    "gpt_oss": ("mlp", ["GptOssMLP"] * 2),
    "llama4_text": ("feed_forward", ["Llama4TextMLP", "Llama4TextMoe"]),
    "granitemoe": ("block_sparse_moe", ["GraniteMoeMoE"] * 2),
}


def adp(**fields: Any) -> LorettaAdpConfig:
    return LorettaAdpConfig(**{"task_type": TASK, "init_weights": False, "non_linearity": "gelu", **fields})


def blocks(model: nn.Module) -> list[LorettaAdpBlock]:
    return [module for module in model.modules() if isinstance(module, LorettaAdpBlock)]


@pytest.mark.parametrize("family", BLOCKS)
def test_a_family_with_experts_is_adapted_at_the_exit_of_every_feed_forward_block(family: str) -> None:
    name, classes = BLOCKS[family]
    base = tiny_model(family)
    expected = tiny_logits(base, TASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, LorettaAdpConfig(task_type=TASK)).eval()
    layers = model.base_model.model.model.layers
    adapted = [module for module in model.modules() if isinstance(module, LorettaLayer)]
    assert adapted == [getattr(layer, name).loretta_block for layer in layers]
    assert [type(layer.base_layer).__name__ for layer in adapted] == classes
    assert [layer.placement for layer in adapted] == [{"default": "output_adapter"}] * 2
    assert torch.equal(tiny_logits(model, TASK), expected)


class Residual(nn.Module):
    """A block [..., 12] without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.bias = True

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * self.down(torch.tanh(self.up(hidden_states)))


class Routed(Residual):
    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, str]:  # type: ignore[override]
        return super().forward(hidden_states, scale).flatten(0, -2), "scores"


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> Any:
        return self.block(hidden_states=x, scale=2.0)


@pytest.mark.parametrize("by_keyword", [True, False], ids=["by-keyword", "by-position"])
@pytest.mark.parametrize("kind", [Residual, Routed])
def test_each_placement_computes_its_formula_on_the_first_output(kind: type, by_keyword: bool) -> None:
    x = torch.randn(3, 5, 12)
    for fields, formula in [
        ({"adapter_type": "mh_adapter"}, lambda layer, bare: bare(x + definition(layer, x))),
        ({"adapter_type": "output_adapter"}, lambda layer, bare: bare(x) + definition(layer, bare(x))),
        ({"use_parallel_adapter": True}, lambda layer, bare: bare(x) + definition(layer, x)),
    ]:
        model = Model(kind())
        plain = copy.deepcopy(model.block)
        get_peft_model(model, adp(target_modules=["block"], task_type=None, bottleneck_size=6, **fields))
        output = model.block(hidden_states=x, scale=2.0) if by_keyword else model.block(x, 2.0)
        expected = formula(model.block.loretta_block, lambda x, plain=plain: Residual.forward(plain, x, 2.0))
        if kind is Routed:
            assert (type(output), output[1]) == (tuple, "scores")
            output, expected = output[0], expected.flatten(0, -2)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("family", "targets", "class_name"),
    [
        ("llama", ["mlp"], "LlamaMLP"),
        ("llama", ["self_attn"], "LlamaAttention"),
        ("llama", ["layers.0"], "LlamaDecoderLayer"),
        ("gpt2", r".*\.h\.1\.mlp", "GPT2MLP"),
        ("gpt_neox", ["embed_in"], "Embedding"),
    ],
    ids=["feed-forward", "attention-by-keyword", "layer", "regex", "embedding"],
)
def test_explicit_targets_may_name_blocks_of_any_model(family: str, targets: Any, class_name: str) -> None:
    base = tiny_model(family)
    expected = tiny_logits(base, TASK)
    model = get_peft_model(base, adp(target_modules=targets))
    assert {type(block.base_layer).__name__ for block in blocks(model)} == {class_name}
    model.train()(**tiny_batch(TASK)).loss.backward()
    assert all(p.grad.any() for block in blocks(model) for p in block.parameters())
    assert not torch.equal(tiny_logits(model.eval(), TASK), expected)
    with model.disable_adapter():
        assert torch.equal(tiny_logits(model, TASK), expected)


def test_a_block_that_gives_another_width_than_the_models_is_named() -> None:
    model = get_peft_model(tiny_model("bert"), adp(target_modules=["intermediate"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"BertIntermediate are for \[\.\.\., 32\], got \[2, 12, 48\]"):
        tiny_logits(model, "SEQ_CLS")


def test_the_block_stays_what_it_was() -> None:
    model = Model(Residual())
    block, names = model.block, set(model.state_dict())
    wrapped = get_peft_model(model, adp(target_modules=["block"], task_type=None, bias="adapter_only")).eval()
    assert model.block is block
    assert type(block) is Residual
    assert block.bias is True
    assert names < set(model.state_dict())
    x = torch.randn(2, 3, 12)
    block.forward = lambda hidden_states, scale: hidden_states  # what kernels and patches of transformers do
    torch.testing.assert_close(wrapped(x), x + definition(block.loretta_block, x))
    del block.forward
    adapted = wrapped(x)
    unloaded = wrapped.unload()
    assert set(unloaded.state_dict()) == names
    assert not block._forward_hooks
    assert not block._forward_pre_hooks
    assert torch.equal(unloaded(x), Residual.forward(block, x, 2.0))
    assert not torch.equal(unloaded(x), adapted)


def test_a_replica_of_a_block_calls_its_own_adapter() -> None:
    model = Model(Residual())
    get_peft_model(model, adp(target_modules=["block"], task_type=None))
    x = torch.randn(2, 3, 12)
    replica = copy.copy(model.block)  # as nn.DataParallel makes them: the hooks are shared, the children are not
    replica._modules = {**model.block._modules, "loretta_block": copy.deepcopy(model.block.loretta_block)}
    nn.init.normal_(replica.loretta_block.loretta_adp_up["default"].bias)
    z = Residual.forward(replica, x)
    torch.testing.assert_close(replica(x), z + definition(replica.loretta_block, z))
    assert not torch.allclose(replica(x), model.block(x))


def test_adapters_at_a_block_switch_add_up_and_are_deleted() -> None:
    model = get_peft_model(tiny_model("gpt_oss"), adp(train_layernorm=False), adapter_name="x").eval()
    model.add_adapter("y", adp(train_layernorm=False))
    assert len(blocks(model)) == 2
    alone_x = tiny_logits(model, TASK)
    model.set_adapter("y")
    alone_y = tiny_logits(model, TASK)
    trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"y"}
    model.base_model.set_adapter(["x", "y"])
    both = tiny_logits(model, TASK)
    assert not any(torch.allclose(a, b) for a, b in [(alone_x, alone_y), (both, alone_x), (both, alone_y)])
    model.set_adapter("y")
    model.delete_adapter("x")
    assert not any(".x." in name for name in model.state_dict())
    assert torch.equal(tiny_logits(model, TASK), alone_y)


def test_a_model_with_adapted_blocks_pickles_and_copies() -> None:
    model = get_peft_model(tiny_model("gpt_oss"), adp()).eval()
    expected = tiny_logits(model, TASK)
    others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    nn.init.normal_(blocks(model)[0].loretta_adp_up["default"].bias)
    for other in others:
        assert torch.equal(tiny_logits(other, TASK), expected)
    assert not torch.equal(tiny_logits(model, TASK), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("by_transformers", [False, True], ids=["by-peft", "by-transformers"])
def test_a_saved_adapter_loads_in_every_way(by_transformers: bool, low_cpu_mem_usage: bool, tmp_path) -> None:
    model = get_peft_model(tiny_model("mixtral"), adp()).eval()
    model.save_pretrained(tmp_path)
    plain = tiny_model("mixtral")
    if by_transformers:
        plain.load_adapter(str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    else:
        plain = PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(tiny_logits(plain, TASK), tiny_logits(model, TASK))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model = get_peft_model(tiny_model("llama"), adp(target_modules=["mlp"], adapter_dropout=0.3)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model.zero_grad()
        model(**tiny_batch(TASK)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("placement", "kind"), [("mh_adapter", Residual), ("output_adapter", Routed)])
def test_a_training_step_compiles_without_a_graph_break(placement: str, kind: type) -> None:
    model = Model(kind())
    get_peft_model(model, adp(target_modules=["block"], task_type=None, adapter_type=placement)).train()
    x = torch.randn(2, 3, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


def test_beside_a_16_bit_block_the_cores_are_fp32_and_activations_keep_their_dtype() -> None:
    model = get_peft_model(tiny_model("llama4_text").bfloat16(), adp(train_layernorm=False))
    assert {p.dtype for block in blocks(model) for p in block.parameters()} == {torch.float32}
    assert model(**tiny_batch(TASK)).logits.dtype == torch.bfloat16


def test_an_adapter_is_made_on_the_device_of_its_block() -> None:
    with torch.device("meta"):
        base = tiny_model("mixtral")
    assert all(p.is_meta for block in blocks(get_peft_model(base, adp())) for p in block.parameters())


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(12, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x)


class Output(NamedTuple):
    hidden: torch.Tensor


class Named(Residual):
    def forward(self, x: torch.Tensor) -> Output:  # type: ignore[override]
        return Output(x)


class WithoutInput(Residual):
    def forward(self, *, hidden_states: None = None, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.ModuleList([nn.Linear(4, 4)]), "'block'.*got ModuleList"),
        (nn.Conv1d(4, 4, 1), "'block'.*got Conv1d"),
        (nn.Dropout(), "width of this Dropout cannot be told"),
        (Pooler(), "width of this Pooler cannot be told"),
    ],
    ids=["not-callable", "features-not-last", "no-weights", "two-widths"],
)
def test_what_cannot_be_adapted_is_named(module: nn.Module, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        get_peft_model(Model(module), adp(target_modules=["block"], task_type=None))
    with pytest.raises(ValueError, match=r"torch\.nn\.Linear"):
        get_peft_model(Model(module), LorettaRepConfig(target_modules=["block"]))


@pytest.mark.parametrize(
    ("block", "placement", "what"),
    [
        (Named(), "output_adapter", "exit of Named.*got Output"),
        (WithoutInput(), "mh_adapter", "entrance of WithoutInput.*'hidden_states', got NoneType"),
    ],
    ids=["output", "input"],
)
def test_a_block_that_gives_no_tensor_is_named(block: nn.Module, placement: str, what: str) -> None:
    get_peft_model(Model(block), adp(target_modules=["block"], task_type=None, adapter_type=placement))
    with pytest.raises(TypeError, match=what):
        block(x=torch.randn(2, 12))


@pytest.mark.parametrize("non_linearity", ["relu", "identity"])
def test_an_adapter_at_a_block_cannot_be_merged(non_linearity: str) -> None:
    model = get_peft_model(tiny_model("mixtral"), adp(target_modules=["mlp", "o_proj"], non_linearity=non_linearity))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert not any(module.merged for module in model.modules() if isinstance(module, LorettaLayer))
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock cannot be merged"):
        blocks(model)[0].merge()


def test_linears_that_earlier_adapters_have_on_their_input_stay_there() -> None:
    model = get_peft_model(tiny_model("llama4_text"), adp(target_modules=["gate_proj", "up_proj", "down_proj"]))
    layer = model.base_model.model.model.layers[0].feed_forward
    placements = [getattr(layer, name).placement["default"] for name in ("gate_proj", "up_proj", "down_proj")]
    assert placements == ["mh_adapter", "mh_adapter", "output_adapter"]


@pytest.mark.parametrize("config_class", [LorettaAdpConfig, LorettaRepConfig])
@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_all_linear_says_that_it_passes_experts_over(family: str, config_class: type) -> None:
    with pytest.warns(UserWarning, match=r"all-linear leaves 2 modules out.*experts', whose experts are parameters"):
        model = get_peft_model(tiny_model(family), config_class(task_type=TASK, target_modules="all-linear"))
    model(**tiny_batch(TASK)).loss.backward()


@pytest.mark.parametrize(
    "row",
    [Family(("q_proj",), after_attention=("o_proj",)), Family(("q_proj",), after=("shared_expert",))],
    ids=["none-of-it", "not-the-experts"],
)
def test_a_default_that_leaves_the_feed_forward_out_says_so(row: Family, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen2_moe", row)
    with pytest.warns(UserWarning, match=r"default targets of 'qwen2_moe' leave the feed-forward out.*1\.mlp\.experts"):
        get_peft_model(tiny_model("qwen2_moe"), LorettaAdpConfig(task_type=TASK))
    monkeypatch.setitem(FAMILIES, "llama", Family(("q_proj",), after_attention=("o_proj",)))
    with pytest.warns(UserWarning, match="default targets of 'llama' leave the feed-forward out; name"):
        get_peft_model(tiny_model("llama"), LorettaAdpConfig(task_type=TASK))


def test_rep_has_a_default_for_every_family_that_lora_has() -> None:
    assert set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING) | set(FAMILIES) == set(REP_TARGETS)
    model = get_peft_model(tiny_model("deepseek_v3"), LorettaRepConfig(task_type=TASK))
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, LorettaLayer)}
    assert names == {"q_b_proj", "kv_b_proj"}


def test_a_default_that_is_a_regex_cannot_be_restricted_to_layers(monkeypatch) -> None:
    monkeypatch.setattr("loretta.targets.FAMILIES", {name: row for name, row in FAMILIES.items() if name != "llama"})
    monkeypatch.setitem(REP_TARGETS.others, "llama", r".*\.(q_proj|v_proj)")
    model = get_peft_model(tiny_model("llama"), LorettaRepConfig(task_type=TASK))
    assert sum(isinstance(module, LorettaLayer) for module in model.modules()) == 4
    with pytest.raises(ValueError, match=r"layers_to_transform.*'llama' is a regex"):
        get_peft_model(tiny_model("llama"), LorettaRepConfig(task_type=TASK, layers_to_transform=[0]))


def test_the_width_of_a_block_is_the_hidden_size_of_the_nearest_config() -> None:
    assert {block.in_features for block in blocks(get_peft_model(tiny_model("llama4_text"), adp()))} == {HIDDEN}
    attention = nn.MultiheadAttention(12, 2, batch_first=True)
    model = Model(attention)
    get_peft_model(model, adp(target_modules=["block"], task_type=None))
    x = torch.randn(2, 3, 12)
    assert attention(x, x, x)[1].shape == (2, 3, 3)
    assert attention.loretta_block.in_features == 12
