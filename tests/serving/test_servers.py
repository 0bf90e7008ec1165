"""An export for a server gives, read as that server's loader reads it, the logits of the adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel as StockPeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from loretta import LorettaAdpConfig, LorettaRepConfig, export_lora, get_peft_model
from loretta.__main__ import main
from loretta.export import EXPORT_TARGETS
from loretta.servers import SERVERS
from loretta.tensor_train import TensorTrain
from loretta_kernels import TTShape
from tests.serving.loaders import LOADERS, read
from tests.serving.test_docs import save_adapter, save_base
from tests.tiny_models import tiny_logits, tiny_model

# Each case for a reason: what a loader that reads r, lora_alpha and the tensors alone could get wrong.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "defaults": ("llama", {}, {}),
    "other-ranks-and-alphas": (
        "llama",
        {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 40, "layers.1.self_attn.v_proj": 3}},
        {},
    ),
    "r-below-the-waist": ("llama", {"r": 3}, {}),
    "every-linear": ("qwen2", {"target_modules": "all-linear"}, {}),
    "a-regex": ("llama", {"target_modules": r".*\.(q_proj|v_proj|gate_proj)"}, {}),
    "one-layer": ("opt", {"layers_to_transform": [1], "layers_pattern": "layers"}, {}),
    "slices-of-a-fused-projection": ("phi3", {"enable_lora": [True, False, True]}, {"num_key_value_heads": 4}),
    "alpha-zero": ("llama", {"lora_alpha": 0}, {}),
}


def adapted(model_type: str, overrides: dict[str, Any] | None = None, **fields: Any) -> tuple[PreTrainedModel, Any]:
    """A tiny base and a copy of it with a random adapter that leaves the norms alone, in eval mode."""
    base = tiny_model(model_type, **(overrides or {}))
    config = LorettaRepConfig(**{"task_type": "CAUSAL_LM", "init_weights": False, "train_layernorm": False, **fields})
    return base, get_peft_model(copy.deepcopy(base), config).eval()


def with_deltas(base: PreTrainedModel, deltas: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The base with each named linear's weight changed."""
    for name, delta in deltas.items():
        base.get_submodule(name).weight.data += delta
    return base


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("case", CASES)
def test_a_server_computes_what_the_adapter_does(server: str, case: str, tmp_path: Path) -> None:
    model_type, fields, overrides = CASES[case]
    base, model = adapted(model_type, overrides, **fields)
    export_lora(model, tmp_path, target=server)
    expected, unadapted = tiny_logits(model, "CAUSAL_LM"), tiny_logits(base, "CAUSAL_LM")
    stock = StockPeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(tiny_logits(stock, "CAUSAL_LM"), expected)
    served = with_deltas(base, LOADERS[server](tmp_path))
    torch.testing.assert_close(tiny_logits(served, "CAUSAL_LM"), expected)
    assert torch.equal(expected, unadapted) == (case == "alpha-zero")


def test_all_modules_have_the_rank_of_the_widest_cut_and_no_pattern(tmp_path: Path) -> None:
    _, model = adapted("llama", r=8, tensor_rank=5, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 1})
    export_lora(model, tmp_path, target="vllm")
    config, tensors = read(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert {len(tensor) if "lora_A" in name else tensor.shape[1] for name, tensor in tensors.items()} == {5}


def test_peft_keeps_the_adapters_own_rank_alpha_and_patterns(tmp_path: Path) -> None:
    _, model = adapted("llama", rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 1})
    export_lora(model, tmp_path)
    config, _ = read(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"v_proj": 4}, {"v_proj": 1})


@pytest.mark.parametrize("target", EXPORT_TARGETS)
def test_the_file_says_that_it_is_of_pytorch(target: str, tmp_path: Path) -> None:
    _, model = adapted("llama")
    export_lora(model, tmp_path, target=target)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(TTShape((4, 3), (2, 5), (2, 3, 4)), id="bonds-all-different"),
        pytest.param(TTShape((12,), (10,), (7,)), id="one-mode-each"),
        pytest.param(TTShape((2, 3, 2), (10,), (60, 50, 3)), id="bonds-wider-than-a-side"),
    ],
)
def test_the_two_halves_of_a_train_multiply_to_its_matrix(shape: TTShape) -> None:
    torch.manual_seed(0)
    train = TensorTrain(shape).double()
    left, right = train.sides()
    assert left.shape == (shape.in_features, shape.waist)
    assert right.shape == (shape.waist, shape.out_features)
    torch.testing.assert_close(left @ right, train.matrix())


# What a server cannot take: the adapter, and what is said of it, with the way out.
REFUSALS: dict[str, tuple[tuple[str, ...], str, dict[str, Any], str]] = {
    "norms": (SERVERS, "llama", {"train_layernorm": True}, r"norm.*train_layernorm=False, --no-train-layernorm.*merge"),
    "a-head": (SERVERS, "llama", {"modules_to_save": ["lm_head"]}, r"trained whole \(lm_head\).*or merge"),
    "biases": (SERVERS, "opt", {"bias": "lora_only"}, r"bias='none', not 'lora_only', or merge"),
    "a-transposed-weight": (SERVERS, "gpt2", {}, r"transformer.h.0.attn.c_attn, .* \(Conv1D\).*merge"),
    "a-tied-head": (
        SERVERS,
        "gemma",
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        r"lm_head shares its weight with the embeddings.*exclude_modules=\['lm_head'\]",
    ),
    "a-rank-above-all": (
        ("vllm",),
        "llama",
        {"r": 513, "matrix_shapes": {
            "32x513": {"in_modes": [32], "out_modes": [513], "ranks": [513]},
            "513x32": {"in_modes": [513], "out_modes": [32], "ranks": [513]},
            "513x16": {"in_modes": [513], "out_modes": [16], "ranks": [513]},
        }},
        r"--max-lora-rank is at most 512, and this adapter has rank 513",
    ),
    "names-without-a-layer": (("sglang",), "bloom", {}, r"ignores transformer.h.0.self_attention.query_key_value"),
    "two-stacks-of-layers": (
        ("sglang",),
        "bart",
        {"task_type": "SEQ_2_SEQ_LM"},
        r"one q_proj, v_proj for each layer number",
    ),
    "queries-alone": (("sglang",), "llama", {"target_modules": ["q_proj"]}, r"needs q_proj and v_proj"),
    "values-alone": (("sglang",), "llama", {"target_modules": ["v_proj"]}, r"needs q_proj and v_proj"),
    "up-alone": (("sglang",), "llama", {"target_modules": ["up_proj"]}, r"needs gate_proj"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("server", "case"), [(server, case) for case, (servers, *_) in REFUSALS.items() for server in servers]
)
def test_what_a_server_would_ignore_or_misread_is_refused(server: str, case: str, tmp_path: Path) -> None:
    _, model_type, fields, said = REFUSALS[case]
    _, model = adapted(model_type, **fields)
    with pytest.raises(ValueError, match=said):
        export_lora(model, tmp_path / "out", target=server)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("server", SERVERS)
def test_a_linear_adapter_with_biases_is_refused(server: str, tmp_path: Path) -> None:
    fields = {"task_type": "CAUSAL_LM", "init_weights": False, "train_layernorm": False, "non_linearity": "identity"}
    model = get_peft_model(tiny_model("llama"), LorettaAdpConfig(**fields)).eval()
    with pytest.raises(ValueError, match="it takes no bias in a LoRA, and this adapter's trains have biases: merge"):
        export_lora(model, tmp_path / "out", target=server)
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    _, model = adapted("llama")
    with pytest.raises(ValueError, match=r"target must be one of 'peft', 'vllm', 'sglang', 'llama.cpp', got 'ollama'"):
        export_lora(model, tmp_path, target="ollama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters on a saved base, with and without trained norms."""
    root = tmp_path_factory.mktemp("saved")
    save_base(root / "base")
    for name, norms in (("norms", True), ("plain", False)):
        config = LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False, train_layernorm=norms)
        save_adapter(root / "base", config, root / name)
    return root


@pytest.mark.parametrize("target", EXPORT_TARGETS)
def test_the_command_writes_for_each_target(target: str, saved: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", "--adapter", str(saved / "plain"), "--for", target, "--output", str(tmp_path / "out")]) == 0
    rank = 8 if target == "peft" else 5
    assert f"rank {rank}, for {target}" in capsys.readouterr().out
    assert read(tmp_path / "out")[0]["r"] == rank


def test_the_command_refuses_norms_with_the_way_out(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["export", "--adapter", str(saved / "norms"), "--for", "vllm", "--output", str(out)]) != 0
    assert "--no-train-layernorm" in capsys.readouterr().err
    assert not out.exists()
