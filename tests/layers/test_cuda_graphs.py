"""A wrapped model in CUDA graphs, as torch.compile's reduce-overhead makes them: the same gradients, fresh dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import loretta_kernels
from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from tests.tiny_models import tiny_batch, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", init_weights=False, scaling="learned"),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False, lora_dropout=0.0),
}


def step(model: nn.Module, forward) -> dict[str, torch.Tensor]:
    """A step's gradients and loss, copied out of a graph's memory."""
    torch.compiler.cudagraph_mark_step_begin()
    model.zero_grad(set_to_none=True)
    loss = forward(**{name: tensor.cuda() for name, tensor in tiny_batch("CAUSAL_LM").items()}).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return found | {"loss": loss.detach().clone()}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("method", CONFIGS)
def test_replays_have_the_gradients_of_eager_steps(method: str, backend: str) -> None:
    model = get_peft_model(tiny_model("llama").cuda(), CONFIGS[method]).train()
    with loretta_kernels.backend(backend):
        expected = step(model, model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # warm-up, recording, replays
            found = step(model, compiled)
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_replays_draw_other_masks() -> None:
    config = LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False, lora_dropout=0.5)
    model = get_peft_model(tiny_model("llama").cuda(), config).train()
    with loretta_kernels.backend("triton"):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        losses = [step(model, compiled)["loss"].item() for _ in range(6)]
    assert len(set(losses)) == 6
