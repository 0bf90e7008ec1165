"""A tiny Llama trained through the kernels and through PyTorch: the same losses."""

from __future__ import annotations

import pytest
import torch

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta_kernels import backend
from loretta_kernels._triton import launch
from tests.tiny_models import tiny_batch, tiny_model

STEPS = 20
CONFIGS = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", bottleneck_size=8, tensor_rank=3, scaling="learned"),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", tensor_rank=3, lora_dropout=0.0),
}


def losses(method: str, name: str) -> list[float]:
    """The loss of every step of a short training run, all through one backend."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), CONFIGS[method]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, seen = tiny_batch("CAUSAL_LM"), []
    with backend(name):
        for _ in range(STEPS):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    return seen


@pytest.mark.parametrize(("executor", "method"), [("sm_90", "adp"), ("sm_80", "rep")], indirect=["executor"])
def test_twenty_steps_through_the_kernels_have_the_losses_of_pytorch(method: str) -> None:
    expected = losses(method, "torch")
    with launch.recorded(run=True) as launches:
        got = losses(method, "triton")
    adapters = {"adp": 6, "rep": 4}[method]
    assert len(launches) == 2 * adapters * STEPS
    assert expected[-1] < expected[0] - 0.1
    assert got == pytest.approx(expected, abs=1e-4)
