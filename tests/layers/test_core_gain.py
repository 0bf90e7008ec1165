"""Trains with gains: which adapters have them, what they change (the length of a step) and what not (the function)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from loretta import LorettaAdpConfig, LorettaRepConfig, export_lora, get_peft_model
from loretta.layer import adapter_train
from loretta.tensor_train import TensorTrain
from loretta_kernels import TT, start, tt_matrix
from tests.tiny_models import tiny_logits, tiny_model

# Written by commit 3002636, the last one without the field: roberta for SEQ_CLS, every core and bias drawn.
BEFORE = Path(__file__).parent / "fixtures" / "before_core_gain"
REP = {"task_type": "CAUSAL_LM", "init_weights": False, "train_layernorm": False}
LINEAR = {
    "rep": LorettaRepConfig(**REP),
    "adp": LorettaAdpConfig(**REP, non_linearity="identity"),
}


def trains(model: torch.nn.Module) -> list[TensorTrain]:
    return [module for module in model.modules() if isinstance(module, TensorTrain)]


@pytest.mark.parametrize("method", ["adp", "rep"])
def test_an_adapter_saved_before_gains_is_read_without_them(method: str, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_model("roberta", "SEQ_CLS"), BEFORE / method).eval()
    assert {train.shape.gains for train in trains(model)} == {(0, 0)}
    expected = load_file(BEFORE / method / "expected.safetensors")["logits"]
    torch.testing.assert_close(tiny_logits(model, "SEQ_CLS"), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (BEFORE / method, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert PeftConfig.from_pretrained(tmp_path).core_gain == "paper"


@pytest.mark.parametrize("core_gain", [None, "rate", "paper"])
def test_a_saved_config_says_what_its_cores_are(core_gain: str | None, tmp_path: Path) -> None:
    config = LorettaRepConfig(core_gain=core_gain)
    assert config.core_gain == (core_gain or "rate")
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["core_gain"] == config.core_gain
    assert PeftConfig.from_pretrained(str(tmp_path)).core_gain == config.core_gain


def test_gains_among_the_modes_of_a_matrix_are_refused() -> None:
    train = {"in_modes": [8], "out_modes": [4], "ranks": [2], "gains": [1, 0]}
    with pytest.raises(ValueError, match="gains follow from core_gain"):
        LorettaRepConfig(matrix_shapes={"8x4": train})


@pytest.mark.parametrize("method", LINEAR)
def test_merged_exported_and_reloaded_adapters_have_their_gains(method: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), LINEAR[method]).eval()
    assert all(any(train.shape.gains) for train in trains(model))
    expected = tiny_logits(model, "CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").eval()
    assert torch.equal(tiny_logits(reloaded, "CAUSAL_LM"), expected)
    export_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora").eval()
    for found in (exported, model.merge_and_unload()):
        torch.testing.assert_close(tiny_logits(found, "CAUSAL_LM"), expected, rtol=1e-4, atol=1e-4)


def test_adapters_with_and_without_gains_live_in_one_model() -> None:
    model = get_peft_model(tiny_model("llama"), LorettaRepConfig(**REP), adapter_name="a").eval()
    model.add_adapter("b", LorettaRepConfig(**REP, core_gain="paper"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert any(layer.loretta_rep_A["a"].shape.gains)
    assert not any(layer.loretta_rep_A["b"].shape.gains)


@pytest.mark.parametrize("init_weights", ["gaussian", False])
def test_the_papers_start_is_the_same_matrix_with_gains(init_weights: str | bool) -> None:
    made = []
    for core_gain in ("paper", "rate"):
        torch.manual_seed(0)
        config = LorettaAdpConfig(core_gain=core_gain, init_weights=init_weights)
        made.append(adapter_train(config, 256, 64, 5, up=False))
    torch.testing.assert_close(made[1].matrix(), made[0].matrix())
    assert not torch.allclose(made[1].cores, made[0].cores)


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("rank", [2, 5, 16])
@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_a_step_moves_a_train_as_far_as_a_lora_at_every_width(width: int, rank: int, up: bool) -> None:
    torch.manual_seed(0)
    sizes = (8, width) if up else (width, 8)
    train = adapter_train(LorettaRepConfig(), *sizes, rank, up=up)
    cut = train.shape.core_sizes
    moved = [part.clone() for part in train.cores.detach().split(cut)]
    largest = cut.index(max(cut))
    moved[largest] += 1e-3 * torch.randn(cut[largest]).sign()  # what Adam does first
    distance = (tt_matrix(TT(torch.cat(moved), train.shape)) - train.matrix()).norm().item()
    reach = width if up else math.sqrt(1024 * width)
    wanted = 1e-3 * math.sqrt(train.shape.waist * reach)  # up: as each entry of a factor width x waist moves
    assert wanted / 3 < distance < 3 * wanted  # at rank 16 the ends of a train of r = 8 cannot be orthonormal


@pytest.mark.parametrize("method", [LorettaAdpConfig, LorettaRepConfig])
def test_a_layer_of_a_new_head_starts_as_the_paper_draws_it(method: type[LorettaAdpConfig | LorettaRepConfig]) -> None:
    matrices = []
    for core_gain in ("rate", "paper"):
        torch.manual_seed(0)
        matrices.append(adapter_train(method(core_gain=core_gain), 96, 96, 5, head=True).matrix())
    torch.testing.assert_close(*matrices)


@pytest.mark.parametrize(("width", "rank"), [(256, 2), (576, 5), (4096, 5), (8192, 16)])
def test_the_core_that_is_zero_moves_further_and_its_side_keeps_its_gain(
    width: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that saved cores, which know the gain of a side alone, stay what they are."""
    found = []
    for zero_gain in (1.0, 2.0):
        monkeypatch.setattr(start, "ZERO_GAIN", zero_gain)
        train = adapter_train(LorettaRepConfig(), 8, width, rank, up=True)
        stored = train.cores.detach().split(train.shape.core_sizes)
        zero = next(k for k, core in enumerate(stored) if not core.any())
        found.append((train.shape, start.stored_gains(train.shape, up=True), zero))
    (shape, equal, zero), (same, gains, _) = found
    assert shape == same
    assert gains[zero] == pytest.approx(2 * equal[zero])
    sides = slice(None, shape.cut), slice(shape.cut, None)
    assert [math.prod(gains[side]) for side in sides] == pytest.approx(list(shape.factors))
