"""Training on a quantised base: gradients at every moment, a base that stays as it is, a reload with the same bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import prepare_model_for_kbit_training

from loretta import PeftModel, get_peft_model
from tests.tiny_models import tiny_batch, tiny_logits

from .bases import CONFIGS, WEIGHTS_ONLY, base_weights, gradients, load, quantised_layers, save_llama, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", WEIGHTS_ONLY)
def test_an_evaluation_and_a_save_change_neither_gradients_nor_the_base(
    kind: str, method: str, folder: Path, tmp_path: Path
) -> None:
    base = load(folder, WEIGHTS_ONLY[kind]())
    model = get_peft_model(base, CONFIGS[method])
    assert len(quantised_layers(model)) == 14
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    weights, expected = base_weights(model), gradients(model)
    assert expected.keys() == trained(model).keys()
    assert all(gradient.any() for gradient in expected.values())

    model.eval()
    tiny_logits(model, "CAUSAL_LM")
    assert_same(gradients(model), expected)
    model.save_pretrained(tmp_path)
    model.state_dict()
    assert_same(gradients(model), expected)
    assert_same(base_weights(model), weights)

    reloaded = PeftModel.from_pretrained(load(folder, WEIGHTS_ONLY[kind]()), tmp_path, is_trainable=True)
    assert_same(dict(trained(reloaded)), dict(trained(model)))
    logits = tiny_logits(model.eval(), "CAUSAL_LM")
    assert torch.equal(tiny_logits(reloaded.eval(), "CAUSAL_LM"), logits)
    with model.disable_adapter():
        bare = tiny_logits(model, "CAUSAL_LM")
    assert not torch.equal(bare, logits)
    assert torch.equal(tiny_logits(model.unload(), "CAUSAL_LM"), bare)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_bf16_base_prepared_and_checkpointed_has_the_same_gradients(
    method: str, use_reentrant: bool, folder: Path
) -> None:
    config, peft_config = WEIGHTS_ONLY["nf4-double"](), copy.deepcopy(CONFIGS[method])
    if method == "adp":
        peft_config.non_linearity = "tanh"  # where relu bends, a rounding can decide a gradient
    plain = get_peft_model(load(folder, config, torch.bfloat16), copy.deepcopy(peft_config))
    cores = {name: parameter for name, parameter in trained(plain).items() if "norm" not in name}
    assert {parameter.dtype for parameter in trained(plain).values()} == {torch.float32}

    prepared = prepare_model_for_kbit_training(
        load(folder, config, torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    model = get_peft_model(prepared, peft_config)
    model.load_state_dict(cores, strict=False)
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name in cores:  # the prepared one computes norms and logits in fp32
        assert torch.nn.functional.cosine_similarity(found[name], expected[name], dim=0) > 0.99, name


@pytest.mark.parametrize("method", CONFIGS)
def test_a_few_steps_lower_the_loss(method: str, folder: Path) -> None:
    model = get_peft_model(load(folder, WEIGHTS_ONLY["nf4-double"](), torch.bfloat16), CONFIGS[method]).train()
    weights = base_weights(model)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**tiny_batch("CAUSAL_LM")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert_same(base_weights(model), weights)
