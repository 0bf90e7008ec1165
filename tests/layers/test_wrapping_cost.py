"""What wrapping a model costs: the adapters' own parameters, and no copy of a weight of the base."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model

HIDDEN = 128
METHODS = [LorettaAdpConfig(task_type="CAUSAL_LM"), LorettaRepConfig(task_type="CAUSAL_LM")]
each_method = pytest.mark.parametrize("config", METHODS, ids=["adp", "rep"])


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest new tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in given:
            self.elements = max(self.elements, out.numel())
        return out


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama of this width."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=32,
        )
    )


@each_method
def test_makes_no_tensor_of_the_size_of_a_weight(config):
    model = llama(HIDDEN, layers=2)
    with LargestTensor() as largest:
        get_peft_model(model, config)
    assert 0 < largest.elements < HIDDEN * HIDDEN // 4


@each_method
def test_leaves_a_model_without_weights_without_weights(config):
    with torch.device("meta"):
        model = llama(HIDDEN, layers=2)
    with LargestTensor() as largest:
        wrapped = get_peft_model(model, config)
    assert largest.elements < HIDDEN * HIDDEN // 4
    assert all(parameter.is_meta for parameter in wrapped.parameters())
