"""torch.compile of a wrapped model, in one graph, for training and for inference, on whole and quantised bases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loretta import get_peft_model
from tests.tiny_models import tiny_batch, tiny_logits

from .bases import CONFIGS, WEIGHTS_ONLY, gradients, load, save_llama

CASES = [
    pytest.param(kind, method, backend, marks=[] if (kind, method, backend) in quick else pytest.mark.slow)
    for quick in [{("whole", "rep", "aot_eager"), ("nf4-double", "adp", "aot_eager")}]
    for backend in ("aot_eager", "inductor")
    for kind in ("whole", *WEIGHTS_ONLY)
    for method in CONFIGS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama", layers=1)


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(("kind", "method", "backend"), CASES)
def test_one_graph_trains_and_infers_as_eagerly(kind: str, method: str, backend: str, folder: Path) -> None:
    base = load(folder, None if kind == "whole" else WEIGHTS_ONLY[kind]())
    model = get_peft_model(base, CONFIGS[method])
    exact = {"rtol": 0.0, "atol": 0.0} if backend == "aot_eager" else {"rtol": 1e-3, "atol": 1e-5}
    logits, expected = tiny_logits(model.eval(), "CAUSAL_LM"), gradients(model)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    compiled(**tiny_batch("CAUSAL_LM")).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **exact, msg=lambda text, name=name: f"{name}: {text}")
    model.eval()
    # Eagerly and without gradients, few rows take contracted sides that are remembered: other roundings.
    torch.testing.assert_close(tiny_logits(compiled, "CAUSAL_LM"), logits, **(exact if exact["rtol"] else CLOSE))
