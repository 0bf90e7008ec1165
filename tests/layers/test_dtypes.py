"""Bases in sixteen bits: cores in fp32 or in the base's dtype, gradients as from the fp32 base, checkpointing too."""

from __future__ import annotations

import copy

import pytest
import torch

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from tests.tiny_models import tiny_batch, tiny_model

CONFIGS = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", init_weights=False, non_linearity="gelu"),  # relu: units flip
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False, lora_dropout=0.0),
}


def gradients(method: str, dtype: torch.dtype, checkpointing: bool | None = None, **options) -> dict:
    """Gradients of all that is trained; checkpointing: None for none, else whether it is reentrant."""
    model = tiny_model("llama").to(dtype)
    torch.manual_seed(0)
    model = get_peft_model(model, copy.deepcopy(CONFIGS[method]), **options).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    (4096 * model(**tiny_batch("CAUSAL_LM")).loss).backward()  # scaled, as fp16 must be
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def core_gradients(method: str, dtype: torch.dtype, **options) -> dict:
    return {name: grad for name, grad in gradients(method, dtype, **options).items() if name.endswith(".cores")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_cores_learn_in_fp32_beside_a_base_of_sixteen_bits(method, dtype) -> None:
    expected, found = (core_gradients(method, each) for each in (torch.float32, dtype))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 16 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
def test_without_autocast_adapter_dtype_the_cores_follow_the_base(method, dtype) -> None:
    found = core_gradients(method, dtype, autocast_adapter_dtype=False)
    assert {gradient.dtype for gradient in found.values()} == {dtype}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_checkpointing_a_bf16_base_changes_no_gradient(method, reentrant) -> None:
    expected, found = (gradients(method, torch.bfloat16, kind) for kind in (None, reentrant))
    assert any("norm" in name for name in expected)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
