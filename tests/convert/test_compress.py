"""LoRA adapters as rep adapters: exact where the rank suffices, near where it does not, nothing dropped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from loretta import LorettaRepConfig, compress_lora
from loretta.compress import aligned_factors, compressed, relative_error
from loretta_kernels import TT, tt_matrix
from tests.tiny_models import tiny_logits, tiny_model, usual_task


def trained_lora(folder: Path, model_type: str, **fields) -> torch.Tensor:
    """Save a LoRA with random factors and whatever else it trains, and give its logits."""
    task = usual_task(model_type)
    config = LoraConfig(**{"task_type": task, "r": 4, "lora_alpha": 6, "lora_dropout": 0.1, **fields})
    model = get_peft_model(tiny_model(model_type), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return tiny_logits(model, task)


CASES = {
    "grouped-query": ("llama", {}),
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}),
    "rank-stabilised-patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
    ),
    "some-layers": ("llama", {"layers_to_transform": [1], "target_modules": ["down_proj", "o_proj"]}),
    "every-linear": ("opt", {"target_modules": "all-linear", "r": 40}),
    "conv1d": ("gpt2", {"fan_in_fan_out": True}),
    "biases": ("opt", {"bias": "all"}),
    "biases-of-targets": ("opt", {"bias": "lora_only"}),
    "a-head-and-saved-modules": ("roberta", {"modules_to_save": ["LayerNorm"]}),
    "gaussian-init": ("t5", {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize(("model_type", "fields"), CASES.values(), ids=CASES)
def test_at_full_rank_the_logits_are_the_loras(model_type: str, fields, tmp_path: Path) -> None:
    wanted = trained_lora(tmp_path / "lora", model_type, **fields)
    report = compress_lora(tmp_path / "lora", 64, tmp_path / "rep")
    assert report.worst < 1e-5
    model = PeftModel.from_pretrained(tiny_model(model_type), tmp_path / "rep").eval()
    assert isinstance(model.active_peft_config, LorettaRepConfig)
    torch.testing.assert_close(tiny_logits(model, usual_task(model_type)), wanted, rtol=1e-4, atol=1e-5)
    adapted = [key.removesuffix(".lora_A.weight") for key in load_file(tmp_path / "lora" / "adapter_model.safetensors")
               if key.endswith(".lora_A.weight")]  # fmt: skip
    assert [f"base_model.model.{layer.name}" for layer in report.layers] == sorted(adapted)


def test_the_report_tells_the_error_of_the_saved_update(tmp_path: Path) -> None:
    trained_lora(tmp_path / "lora", "llama")
    report = compress_lora(tmp_path / "lora", 2, tmp_path / "rep")
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "rep")
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer in report.layers:
        exact = [lora[f"base_model.model.{layer.name}.lora_{factor}.weight"] for factor in "BA"]
        exact = 6 / 4 * (exact[0] @ exact[1])
        saved = model.get_submodule(f"base_model.model.{layer.name}").get_delta_weight("default")
        assert layer.error == pytest.approx(((saved - exact).norm() / exact.norm()).item(), rel=1e-4)
        assert 0.01 < layer.error < 1
    rows = str(report).splitlines()
    assert len(rows) == len(report.layers) + 2
    assert report.layers[0].name in rows[1]
    assert f"{report.worst:.2e}" in rows[-1]
    assert max(max(train["ranks"]) for train in report.config.matrix_shapes.values()) == 2


def test_a_larger_rank_is_nearer_and_alignment_helps() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((256, 8), (8, 256)))
    b *= torch.logspace(0, -3, 8, dtype=torch.float64)[:, None]
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    a, b = a @ rotation, rotation.T @ b  # the product decays fast, neither factor does

    def error(factors, rank: int) -> float:
        trains = [compressed(factor, rank, up) for factor, up in zip(factors, (False, True), strict=True)]
        return relative_error((a, b), [tt_matrix(TT(cores.double(), shape)) for cores, shape in trains])

    errors = [error(aligned_factors(a, b), rank) for rank in (2, 4, 8, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    assert errors[2] < error((a, b), 8)


def test_an_untrained_lora_is_the_zero_update(tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    assert compress_lora(tmp_path / "lora", 3, tmp_path / "rep").worst == 0
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "rep").eval()
    assert torch.equal(tiny_logits(model, "CAUSAL_LM"), tiny_logits(tiny_model("llama"), "CAUSAL_LM"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "cannot represent use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A .*linear"),
    ],
)
def test_what_rep_cannot_represent_is_refused_by_name(fields, message: str, tmp_path: Path) -> None:
    trained_lora(tmp_path / "lora", "llama", **fields)
    with pytest.raises(ValueError, match=message):
        compress_lora(tmp_path / "lora", 2, tmp_path / "rep")
    assert not (tmp_path / "rep").exists()


def test_damaged_and_foreign_folders_are_named(tmp_path: Path) -> None:
    trained_lora(tmp_path / "lora", "llama")
    weights, config = tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "lora" / "adapter_config.json"
    whole, fields = weights.read_bytes(), json.loads(config.read_text())

    def refused(error: type[Exception], message: str, rank: object = 2) -> None:
        with pytest.raises(error, match=message):
            compress_lora(tmp_path / "lora", rank, tmp_path / "rep")

    refused(ValueError, "at least 1", rank=0)
    config.write_text(json.dumps(fields | {"a_new_option": 1}))
    refused(ValueError, "a_new_option=1")
    config.write_text(json.dumps(fields | {"peft_type": "LOHA"}))
    refused(ValueError, "'LOHA'")
    config.write_text("[]")
    refused(ValueError, "'list'")
    config.write_text(json.dumps(fields | {"r": "four"}))
    refused(ValueError, "adapter_config.json|r must be")
    config.write_text(json.dumps(fields))
    weights.write_bytes(whole[: len(whole) // 2])
    refused(ValueError, "truncated or damaged")
    weights.unlink()
    refused(FileNotFoundError, "only safetensors")
    config.unlink()
    refused(FileNotFoundError, "adapter_config.json")
    (tmp_path / "rep").mkdir()
    (tmp_path / "rep" / "mine").touch()
    refused(FileExistsError, "holds something")


def test_a_rank_stabilised_scaling_keeps_its_value(tmp_path: Path) -> None:
    trained_lora(tmp_path / "lora", "llama", use_rslora=True)
    config = compress_lora(tmp_path / "lora", 2, tmp_path / "rep").config
    assert config.lora_alpha / config.r == pytest.approx(6 / math.sqrt(4))
