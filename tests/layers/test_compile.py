"""A wrapped model under torch.compile, gradient checkpointing and the saved-tensor hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from tests.tiny_models import tiny_batch, tiny_model

CONFIGS = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", init_weights=False, scaling="learned", non_linearity="gelu"),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False, lora_dropout=0.0),
}
both_methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def gradients(model: nn.Module, forward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = forward(**tiny_batch("CAUSAL_LM")).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_training_step_compiles_without_a_graph_break(method: str) -> None:
    model = get_peft_model(tiny_model("llama"), CONFIGS[method]).train()
    loss, expected = gradients(model, model)
    torch._dynamo.reset()
    compiled_loss, compiled = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_inductor_compiles_a_layer_with_its_adapter() -> None:
    """A layer alone, which takes no C++: that of a model takes twenty seconds to compile, and is none of ours."""
    config = copy.deepcopy(CONFIGS["adp"])
    config.target_modules, config.task_type = {"0"}, None
    model = get_peft_model(nn.Sequential(nn.Linear(24, 24)), config)
    x, answers = torch.randn(3, 5, 24, requires_grad=True), []
    leaves = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch._dynamo.reset()
    for forward in (model, torch.compile(model, fullgraph=True)):
        y = forward(x)
        answers.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    for name, eager, compiled in zip(["y", *leaves], *answers, strict=True):
        torch.testing.assert_close(compiled, eager, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("method", CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradients(method: str, dropout: float, use_reentrant: bool) -> None:
    config = copy.deepcopy(CONFIGS[method])
    setattr(config, "adapter_dropout" if method == "adp" else "lora_dropout", dropout)
    model = get_peft_model(tiny_model("llama"), config).train()
    torch.manual_seed(3)
    _, expected = gradients(model, model)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    _, checkpointed = gradients(model, model)
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@both_methods
def test_an_adapter_saves_x_and_its_waist_for_backward_and_nothing_else_of_its_length(config) -> None:
    tokens, width = 257, 24
    config = copy.deepcopy(config)
    config.target_modules, config.task_type = {"0"}, None
    model = get_peft_model(nn.Sequential(nn.Linear(width, width)), config)
    x = torch.randn(tokens, width, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    of_length = sorted(tuple(tensor.shape) for tensor in saved if tokens in tensor.shape)
    waist = (tokens, config.tensor_rank)
    # adp: the adapter's x is the linear's output, and the linear's backward needs no x; rep: x, shared by both
    assert of_length == [waist, (tokens, width)]
