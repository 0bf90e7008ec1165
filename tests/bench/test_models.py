"""The models of the training step share weights, compute the same, and train adapters only."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from bench.models import OURS, RELEASED, Step, llama, methods, set_functions, sharing
from bench.upstream import FOLDER


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return llama(config, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["adp", "rep"])
def test_methods_of_a_kind_compute_the_same_with_the_same_weights(kind, base):
    embeddings = torch.randn(1, 3, 768, requires_grad=True)
    labels = torch.randint(32, (1, 3))
    names = [OURS[kind], *(["LoRA r=8"] if kind == "rep" else []), *([RELEASED[kind]] if FOLDER.is_dir() else [])]
    answers = {}
    weights = {parameter.data_ptr() for parameter in base.parameters()}
    for name in names:
        model = methods()[name](sharing(base))
        set_functions(model)
        step = Step(model, embeddings, labels)
        frozen = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
        assert frozen == weights
        answers[name] = step.model(inputs_embeds=embeddings).logits, step.backward(step.forward())[0]
        step.optimise()
        torch.testing.assert_close(step.model(inputs_embeds=embeddings).logits, answers[name][0], rtol=0, atol=0)
    unadapted = base(inputs_embeds=embeddings).logits
    first, *others = answers.values()
    assert (first[0] - unadapted).norm() > 1e-3 * unadapted.norm()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
