"""TRL's own trainers take the two configs: they train, save, reload with the same bits, and DPO starts at ln 2."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loretta import LorettaAdpConfig, LorettaRepConfig, PeftModel, get_peft_model
from tests.tiny_models import VOCABULARY, tiny_logits, tiny_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

CONFIGS: dict[str, Any] = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", bottleneck_size=8),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM"),
}
ROWS = {
    "SFT": [{"prompt": "w7 w8 w9", "completion": " w10 w11"}] * 16,
    "DPO": [{"prompt": "w7 w8 w9", "chosen": " w10 w11", "rejected": " w12 w13 w14"}] * 16,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer(kind: str, model: Any, config: Any, output: Path, tokenizer: Any, **options: Any) -> Any:
    given = {name: options.pop(name) for name in ["disable_dropout"] if name in options}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(output), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **given,
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model, **options) if isinstance(model, Path) else model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS[kind]),
        processing_class=tokenizer,
        peft_config=config,
    )


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_five_steps_lower_the_loss_and_the_adapter_reloads_with_the_same_bits(
    kind: str, method: str, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    run = trainer(kind, folder, CONFIGS[method], tmp_path, tokenizer)
    run.train()
    found = losses(run)
    assert len(found) == 5
    assert found[-1] < found[0]
    if kind == "DPO":  # the reference is the model with the adapter disabled, and the adapter starts as the base
        assert found[0] == pytest.approx(math.log(2), abs=5e-5)

    run.save_model(tmp_path / "adapter")
    model = run.model.eval()
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = dict(reloaded.named_parameters())
    assert all(torch.equal(parameters[name], parameter) for name, parameter in expected.items())
    assert torch.equal(tiny_logits(reloaded.eval(), "CAUSAL_LM"), tiny_logits(model, "CAUSAL_LM"))


@pytest.mark.parametrize("scaling", [1.0, "learned"])
def test_dpo_of_a_trained_adapter_starts_at_its_copy(scaling: Any, folder: Path, tokenizer: Any, tmp_path) -> None:
    """TRL's reference is then a second adapter, into which it copies what has `.default.` in its name."""
    config = LorettaAdpConfig(task_type="CAUSAL_LM", bottleneck_size=8, init_weights=False, scaling=scaling)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    run = trainer("DPO", model, None, tmp_path, tokenizer)
    assert set(model.peft_config) == {"default", "ref"}
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=5e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_dpo_switches_the_dropout_of_adapters_off_unless_it_is_told_not_to(
    method: str, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Where the policy drops elements and the reference does not, the first loss is off ln 2."""
    config = copy.deepcopy(CONFIGS[method])
    config.init_weights = False
    setattr(config, {"adp": "adapter_dropout", "rep": "lora_dropout"}[method], 0.3)
    for off in (True, False):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        run = trainer("DPO", model, None, tmp_path, tokenizer, disable_dropout=off)
        run.train()
        assert (abs(losses(run)[0] - math.log(2)) < 5e-6) == off


def test_dpo_of_an_adapter_that_does_not_start_as_the_base_starts_elsewhere(folder, tokenizer, tmp_path) -> None:
    config = LorettaRepConfig(task_type="CAUSAL_LM", init_weights="gaussian")
    run = trainer("DPO", folder, config, tmp_path, tokenizer)
    run.train()
    assert abs(losses(run)[0] - math.log(2)) > 5e-5  # as far off as a start of 5e-6 is near


def test_sft_on_a_4_bit_base_trains_bf16_cores(folder, tokenizer, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": "cpu"}
    run = trainer("SFT", folder, CONFIGS["rep"], tmp_path, tokenizer, **options, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.bfloat16}
