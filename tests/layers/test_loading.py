"""Every way in which PEFT and transformers load an adapter gives the trained bits, whatever the task and the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from tests.tiny_models import tiny_batch, tiny_model

CONFIGS: dict[str, Any] = {
    "adp": lambda task: LorettaAdpConfig(task_type=task, init_weights=False, scaling="learned"),
    "rep": lambda task: LorettaRepConfig(task_type=task, init_weights=False),
}
CASES = {
    "causal-lm": ("llama", "CAUSAL_LM"),
    "head-with-a-train": ("roberta", "SEQ_CLS"),
    "head-of-bart": ("bart", "SEQ_CLS"),
    "dense-head": ("bert", "SEQ_CLS"),
    "encoder-decoder": ("t5", "SEQ_2_SEQ_LM"),
    "tokens": ("bert", "TOKEN_CLS"),
    "questions": ("bert", "QUESTION_ANS"),
    "features": ("bert", "FEATURE_EXTRACTION"),
}


def output(model: nn.Module, task: str) -> torch.Tensor:
    batch = {name: tensor for name, tensor in tiny_batch(task).items() if name in ("input_ids", "attention_mask")}
    if task == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch).to_tuple()[0]
    return found


def second(base: Any, folder: Path, low: bool) -> Any:
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low)
    model.load_adapter(folder, "second", low_cpu_mem_usage=low)
    model.set_adapter("second")
    return model


def injected(base: Any, folder: Path, low: bool, by_weights: bool = False) -> Any:
    weights = load_peft_weights(str(folder), device="cpu")
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    config = PeftConfig.from_pretrained(str(folder))
    model = inject_adapter_in_model(config, base, low_cpu_mem_usage=low, state_dict=weights if by_weights else None)
    set_peft_model_state_dict(model, weights, low_cpu_mem_usage=low)
    return model


def into_new_adapter(base: Any, folder: Path, low: bool) -> Any:
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    model = get_peft_model(base, config, low_cpu_mem_usage=low)
    model.load_adapter(folder, "default", low_cpu_mem_usage=low)
    return model


def by_transformers(base: Any, folder: Path, low: bool) -> Any:
    base.load_adapter(str(folder), low_cpu_mem_usage=low)
    return base


WAYS: dict[str, Any] = {
    "from_pretrained": lambda base, folder, low: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low),
    "to-train-on": lambda base, folder, low: PeftModel.from_pretrained(
        base, folder, adapter_name="more", is_trainable=True, low_cpu_mem_usage=low
    ),
    "as-second-adapter": second,
    "injected": injected,
    "injected-by-weights": lambda base, folder, low: injected(base, folder, low, by_weights=True),
    "into-a-new-adapter": into_new_adapter,
    "by-transformers": by_transformers,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter with random trained weights on a bf16 base: its folder and its output, made once for each case."""
    made: dict[tuple[str, str], tuple[Path, torch.Tensor]] = {}

    def of(case: str, method: str) -> tuple[Path, torch.Tensor]:
        if (case, method) not in made:
            model_type, task = CASES[case]
            model = get_peft_model(tiny_model(model_type, task).bfloat16(), CONFIGS[method](task))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case, method] = folder, output(model, task)
        return made[case, method]

    return of


EVERY_WAY = ("causal-lm", "head-with-a-train")
LOADS = [(case, way, low) for case in EVERY_WAY for way in WAYS for low in (False, True)]
LOADS += [
    (case, way, True) for case in CASES if case not in EVERY_WAY for way in ("from_pretrained", "by-transformers")
]


@pytest.mark.parametrize(
    ("case", "way", "low"), LOADS, ids=["-".join([case, way, *["low"] * low]) for case, way, low in LOADS]
)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_loaded_adapter_has_the_trained_bits(saved: Any, case: str, method: str, way: str, low: bool) -> None:
    folder, expected = saved(case, method)
    model_type, task = CASES[case]
    model = WAYS[way](tiny_model(model_type, task).bfloat16(), folder, low)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(output(model, task), expected)


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("case", ["causal-lm", "head-with-a-train"])
def test_autocast_adapter_dtype_decides_the_dtype_of_what_is_loaded(
    saved: Any, case: str, method: str, low: bool
) -> None:
    folder, _ = saved(case, method)
    model_type, task = CASES[case]
    for autocast, dtype in [(True, torch.float32), (False, torch.bfloat16)]:
        model = PeftModel.from_pretrained(
            tiny_model(model_type, task).bfloat16(), folder, is_trainable=True, low_cpu_mem_usage=low,
            autocast_adapter_dtype=autocast,
        )  # fmt: skip
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {dtype}
        assert output(model, task).isfinite().all()


NAMED = {
    "adp": LorettaAdpConfig(task_type="SEQ_CLS"),
    "adp-learned-scale": LorettaAdpConfig(task_type="SEQ_CLS", scaling="learned"),
    "adp-dense": LorettaAdpConfig(task_type="SEQ_CLS", tensorized=False),
    "rep": LorettaRepConfig(task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("config", NAMED.values(), ids=NAMED)
def test_every_trained_tensor_has_the_adapters_name_in_its_middle(config: Any) -> None:
    model = get_peft_model(tiny_model("roberta"), config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert [name for name in trained if ".default." not in name] == []


def test_a_learned_scale_of_an_older_file_is_loaded(saved: Any, tmp_path: Path) -> None:
    folder, expected = saved("causal-lm", "adp")
    weights = load_file(folder / "adapter_model.safetensors")
    assert sum("loretta_adp_scaling" in name for name in weights) == 6
    older = {name.replace("loretta_adp_scaling.value", "loretta_adp_scaling"): w for name, w in weights.items()}
    assert older.keys() != weights.keys()
    save_file(older, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    for low in (False, True):
        model = PeftModel.from_pretrained(tiny_model("llama").bfloat16(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(output(model, "CAUSAL_LM"), expected)
