"""Both methods on every family of the table, and nineteen of them through training, saving and a fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma3Config

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.layer import LorettaLayer
from loretta.targets import FAMILIES
from tests.layers.fresh_process import run_fresh
from tests.tiny_models import _SIZES, DTYPES, tiny_batch, tiny_logits, tiny_model, usual_task

METHODS = {"adp": LorettaAdpConfig, "rep": LorettaRepConfig}
RELOADED = ["llama", "mistral", "qwen2", "gemma2", "phi3", "mixtral", "opt", "gpt2", "bloom", "bert", "roberta"]
RELOADED += ["deberta", "deberta-v2", "t5", "bart", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"]


def wrapped(model_type: str, method: str, dtype: torch.dtype = torch.float32, **fields):
    config = METHODS[method](task_type=usual_task(model_type), **{"tensor_rank": 3, **fields})
    return get_peft_model(tiny_model(model_type).to(dtype), config)


def train(model, task: str, steps: int = 3) -> None:
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(steps):
        model(**tiny_batch(task)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_the_tiny_models_cover_the_table() -> None:
    assert set(FAMILIES) - {"gemma3"} == set(_SIZES)


@pytest.mark.parametrize("method", METHODS)
def test_gemma3_behind_an_image_encoder_trains(method: str) -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {**text, "image_size": 28, "patch_size": 14}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    base = AutoModelForImageTextToText.from_config(config)
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", init_weights=False))
    ids = tiny_batch("CAUSAL_LM")["input_ids"]
    model(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
    layers = {name for name, module in model.named_modules() if isinstance(module, LorettaLayer)}
    of_text = [name for name in layers if "language_model" in name]
    assert len(of_text) == {"adp": 3, "rep": 2}[method]
    for name in of_text:
        assert all(p.grad.any() for key, p in model.get_submodule(name).named_parameters() if "loretta" in key)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", _SIZES)
def test_every_trainable_parameter_of_every_family_gets_a_gradient(model_type: str, method: str) -> None:
    task = usual_task(model_type)
    base = tiny_model(model_type)
    expected = tiny_logits(base, task)
    model = (
        wrapped(model_type, method, init_weights=False, lora_dropout=0.0)
        if method == "rep"
        else wrapped(model_type, method, init_weights=False, non_linearity="gelu")
    )
    layers = [module for module in model.modules() if isinstance(module, LorettaLayer)]
    assert len(layers) >= 2

    model.train()
    model(**tiny_batch(task)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    frozen_with = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen_with == []

    model.eval()
    assert not torch.equal(tiny_logits(model, task), expected)
    with model.disable_adapter():
        assert torch.equal(tiny_logits(model, task), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "deberta", "t5"])
def test_the_wrapped_model_starts_as_its_base(model_type: str, method: str) -> None:
    task = usual_task(model_type)
    base = tiny_model(model_type)
    expected = tiny_logits(base, task)
    # the head of a classifier is new in any case: held as a tensor train it starts elsewhere
    model = wrapped(model_type, method, tensorize_head=False).eval()
    assert torch.equal(tiny_logits(model, task), expected)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """Train and save every case, then reload all of them in one fresh process, which writes the logits it sees."""
    root = tmp_path_factory.mktemp("families")
    folders = []
    for model_type in RELOADED:
        for method in METHODS:
            for name, dtype in DTYPES.items():
                folder = root / f"{model_type}+{method}+{name}"
                base = tiny_model(model_type).to(dtype)
                base.save_pretrained(folder / "base")
                task = usual_task(model_type)
                before = tiny_logits(base, task)
                model = get_peft_model(base, METHODS[method](task_type=task, tensor_rank=3))
                train(model, task)
                torch.save(tiny_logits(model, task), folder / "trained.pt")
                with model.disable_adapter():
                    torch.save((before, tiny_logits(model, task)), folder / "disabled.pt")
                model.save_pretrained(folder / "adapter")
                folders.append(str(folder))
    run_fresh("tests.layers.reload_cases", folders)
    return root


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", RELOADED)
def test_a_trained_adapter_reloads_bit_equal_in_a_fresh_process(
    cases: Path, model_type: str, method: str, dtype: str
) -> None:
    folder = cases / f"{model_type}+{method}+{dtype}"
    trained, reloaded = torch.load(folder / "trained.pt"), torch.load(folder / "reloaded.pt")
    before, disabled = torch.load(folder / "disabled.pt")
    assert trained.isfinite().all()
    assert not torch.equal(trained, before)
    assert torch.equal(reloaded, trained)
    assert torch.equal(disabled, before)
