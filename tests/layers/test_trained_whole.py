"""Norms, heads and ``modules_to_save`` beside a base of sixteen bits: trained in fp32, with activations as before."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, PeftModel, get_peft_model
from tests.tiny_models import tiny_batch, tiny_logits, tiny_model, usual_task

CONFIGS: dict[str, Any] = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", non_linearity="gelu"),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", lora_dropout=0.0),
}
both_methods = pytest.mark.parametrize("method", CONFIGS)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def wrapped(method: str, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    config = copy.deepcopy(CONFIGS[method])
    config.task_type = usual_task(model_type)
    options = {name: fields.pop(name) for name in ["autocast_adapter_dtype"] if name in fields}
    for name, value in fields.items():
        setattr(config, name, value)
    return get_peft_model(tiny_model(model_type).to(dtype), config, **options)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def moved_norms(method: str, dtype: torch.dtype) -> torch.Tensor:
    """How far 20 steps of AdamW at 3e-4 move each element of the norms."""
    torch.manual_seed(0)
    model = wrapped(method, dtype=dtype).train()
    norms = [parameter for name, parameter in trained(model).items() if "norm" in name]
    assert len(norms) == 5
    start = torch.cat([norm.detach().float() for norm in norms])
    optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    for seed in range(20):
        scaler.scale(model(**tiny_batch("CAUSAL_LM", seed=seed)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return torch.cat([norm.detach().float() for norm in norms]) - start


@pytest.mark.parametrize("method", CONFIGS)
def test_every_element_of_the_norms_moves_as_beside_an_fp32_base(method: str) -> None:
    expected = moved_norms(method, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        found = moved_norms(method, dtype)
        assert found.ne(0).all()
        assert (found - expected).norm() < 1e-2 * expected.norm()


@both_methods
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "bert", "deberta", "t5", "bart"])
def test_all_that_is_trained_is_fp32_and_no_activation_changes_its_dtype(model_type: str, method: str) -> None:
    def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
        found: dict[str, torch.dtype] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if torch.is_tensor(output):
                    found[name] = output.dtype

            return hook

        handles = [
            module.register_forward_hook(note(name.removeprefix("base_model.model.")))
            for name, module in model.named_modules()
            if not any(part in name for part in (".loretta_", "base_layer", "modules_to_save", "original_module"))
        ]
        tiny_logits(model, usual_task(model_type))
        for handle in handles:
            handle.remove()
        return found

    base = tiny_model(model_type).bfloat16()
    expected = dtypes_of(base)
    model = wrapped(method, model_type)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    found = dtypes_of(model.eval())
    inside = [name for name in expected if name not in found]  # of a head that is trained whole
    assert all(name.split(".")[0] in ("classifier", "pooler", "classification_head", "score") for name in inside)
    assert {name: found[name] for name in expected if name in found} == {
        name: dtype for name, dtype in expected.items() if name in found
    }
    task = usual_task(model_type)
    model.train()(**tiny_batch(task)).loss.backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in trained(model).values())


@both_methods
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_16_bit_model_starts_with_the_bits_of_its_base(autocast: bool, model_type: str, method: str) -> None:
    base = tiny_model(model_type)
    for parameter in base.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)  # products with ones would round alike in any dtype
    base.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = tiny_logits(base, "CAUSAL_LM")
        model = get_peft_model(base, copy.deepcopy(CONFIGS[method])).eval()
        assert torch.equal(tiny_logits(model, "CAUSAL_LM"), expected)


@both_methods
@pytest.mark.parametrize("model_type", ["llama", "roberta"])
@halves
def test_without_autocast_adapter_dtype_all_that_is_trained_follows_the_base(
    dtype: torch.dtype, model_type: str, method: str
) -> None:
    model = wrapped(method, model_type, dtype, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in trained(model).values()} == {dtype}
    (64 * model.train()(**tiny_batch(usual_task(model_type))).loss).backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


@both_methods
@pytest.mark.parametrize("model_type", ["llama", "roberta"])
def test_what_was_trained_is_saved_and_merged_without_a_loss(model_type: str, method: str, tmp_path: Path) -> None:
    task = usual_task(model_type)
    model = wrapped(method, model_type, **({"non_linearity": "identity"} if method == "adp" else {}))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    adapted = tiny_logits(model.eval(), task)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    reloaded = PeftModel.from_pretrained(tiny_model(model_type).bfloat16(), tmp_path, is_trainable=True)
    assert all(torch.equal(parameter, trained(model)[name]) for name, parameter in trained(reloaded).items())
    assert torch.equal(tiny_logits(reloaded.eval(), task), adapted)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny_logits(other, task), adapted)

    base = tiny_model(model_type).bfloat16()
    merged = model.merge_and_unload()
    extra = {name: tensor.dtype for name, tensor in merged.state_dict().items() if name not in base.state_dict()}
    assert all(name.endswith(".bias") for name in extra)
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.bfloat16}
    assert (tiny_logits(merged, task) - adapted).norm() < 0.02 * adapted.norm()


@both_methods
def test_a_model_of_16_bits_generates_as_its_base_until_it_is_trained(method: str) -> None:
    model = wrapped(method).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    ids = tiny_batch("CAUSAL_LM")["input_ids"]
    said = model.generate(input_ids=ids, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=ids, **options), said)


def test_a_16_bit_model_compiles_into_one_graph_with_the_same_gradients() -> None:
    config = copy.deepcopy(CONFIGS["rep"])
    model = get_peft_model(tiny_model("llama", num_hidden_layers=1).bfloat16(), config).train()
    model(**tiny_batch("CAUSAL_LM")).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**tiny_batch("CAUSAL_LM")).loss.backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


class Head(nn.Module):
    """A head that takes and gives more than one tensor, has a buffer and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.batch_norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, Any]:
        h = self.batch_norm(self.first(x) * mask)
        return {"logits": self.second(h), "more": (h, mask), "text": "unchanged"}


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), Head()

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.linear(self.embedding(ids))
        return self.head(x, mask=torch.ones_like(x))


@both_methods
def test_any_module_to_save_keeps_its_inputs_and_outputs(method: str) -> None:
    config = copy.deepcopy(CONFIGS[method])
    config.task_type, config.target_modules, config.modules_to_save = None, {"linear"}, ["head", "embedding"]
    base = WithHead().to(torch.bfloat16).eval()
    ids = torch.arange(5)
    expected = base(ids)
    model = get_peft_model(base, config).eval()
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    head = model.base_model.model.head.modules_to_save["default"]
    assert head.first.weight is head.second.weight
    assert head.batch_norm.running_mean.dtype is torch.float32
    found = model(ids)
    assert found["text"] == "unchanged"
    for name in ("logits", "more"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-2, atol=2e-2)  # dtypes are compared too
    merged = model.train().merge_and_unload() if method == "rep" else model.unload()
    assert {tensor.dtype for tensor in merged.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}


@both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_own_switch_turns_trained_norms_on_again(method: str, dtype: torch.dtype) -> None:
    config = copy.deepcopy(CONFIGS[method])
    config.init_weights = False
    model = tiny_model("llama").to(dtype)
    base = tiny_logits(model, "CAUSAL_LM")
    model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if "norm" in name:
                parameter.add_(0.3)
    adapted = tiny_logits(model, "CAUSAL_LM")
    was_trained = trained(model).keys()
    model.disable_adapters()
    assert torch.equal(tiny_logits(model, "CAUSAL_LM"), base)
    model.enable_adapters()
    assert torch.equal(tiny_logits(model, "CAUSAL_LM"), adapted)
    assert trained(model).keys() == was_trained
    other = copy.deepcopy(model)
    other.disable_adapters()
    other.enable_adapters()
    assert torch.equal(tiny_logits(other, "CAUSAL_LM"), adapted)
