"""Generation: cached, batched, padded on the left and by beams, an adapted model says what it says without these."""

from __future__ import annotations

import pytest
import torch

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from tests.tiny_models import tiny_model

PROMPTS = [[5, 17, 42, 8, 30, 9, 11], [23, 7, 55], [12, 40, 33, 19, 6]]
PAD = 1
CONFIGS = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", init_weights=False),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False, lora_alpha=64),
}
both_methods = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(scope="module")
def models():
    """An adapted model per method and family, whose greedy words are not the base's."""
    made = {}
    for method, config in CONFIGS.items():
        for model_type in ("llama", "gpt2"):
            torch.manual_seed(0)
            made[method, model_type] = get_peft_model(tiny_model(model_type), config).eval()
    return made


def generated(model, prompts: list[list[int]], **options) -> list[list[int]]:
    """What the model adds to each prompt, all in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:].tolist()


BEAMS = {"greedy": {}, "beams": {"num_beams": 3}}


@both_methods
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_a_batch_says_what_each_row_says_alone_without_a_cache(models, method: str, model_type: str, options) -> None:
    model = models[method, model_type]
    alone = [generated(model, [prompt], use_cache=False, **options)[0] for prompt in PROMPTS]
    assert generated(model, PROMPTS, **options) == alone
    with model.disable_adapter():
        assert generated(model, PROMPTS, **options) != alone


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_a_merged_model_says_the_same(models, model_type: str, options) -> None:
    model = models["rep", model_type]
    said = generated(model, PROMPTS, **options)
    model.merge_adapter()
    try:
        assert generated(model, PROMPTS, **options) == said
    finally:
        model.unmerge_adapter()


@both_methods
def test_prompt_tokens_beyond_the_cache_and_several_answers_each(models, method: str) -> None:
    """A static cache, and several beams returned for a prompt."""
    model = models[method, "llama"]
    several = {"num_beams": 4, "num_return_sequences": 2}
    alone = [said for prompt in PROMPTS for said in generated(model, [prompt], use_cache=False, **several)]
    assert generated(model, PROMPTS, **several) == alone
    assert generated(model, PROMPTS, cache_implementation="static", disable_compile=True) == generated(model, PROMPTS)


@both_methods
@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_a_mixed_batch_generates_each_row_with_its_own_adapter(method: str, options) -> None:
    config = type(CONFIGS[method])(task_type="CAUSAL_LM", init_weights=False, train_layernorm=False)
    if method == "rep":
        config.lora_alpha = 64
    model = get_peft_model(tiny_model("llama"), config)
    model.add_adapter("other", config)
    model.eval()
    alone = []
    for name, prompt in zip(("default", "other"), PROMPTS, strict=False):
        model.set_adapter(name)
        alone += generated(model, [prompt], **options)
    with model.disable_adapter():
        alone += generated(model, [PROMPTS[2]], **options)
    assert generated(model, PROMPTS, adapter_names=["default", "other", "__base__"], **options) == alone
    assert generated(model, PROMPTS, adapter_names=["other", "default", "__base__"], **options)[:2] != alone[:2]
