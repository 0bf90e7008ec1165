"""Tiny models and a byte-level tokenizer on disk, and the command line called in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from loretta.__main__ import main

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Ran(NamedTuple):
    """What one command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def result(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def loretta(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every text can be encoded and lengths are plain."""
    specials = ["<pad>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(specials + alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", model_max_length=64)
    made.chat_template = CHAT_TEMPLATE
    return made


def write_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, layers: int) -> Path:
    """A tiny Llama with random weights, and the tokenizer, in a folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a two-layer Llama."""
    return write_llama(tmp_path_factory.mktemp("models") / "llama", tokenizer, layers=2)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a two-layer RoBERTa with random weights and no head."""
    folder = tmp_path_factory.mktemp("models") / "roberta"
    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=66, pad_token_id=0, eos_token_id=1, bos_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that a model can learn in a few steps."""
    file = tmp_path_factory.mktemp("data") / "book.txt"
    file.write_text("the cat sat on the mat and the dog lay on the log. " * 60, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-class file, sorted by class, so that a held-out tail would have one class only."""
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = [f"aaa {number},good" for number in range(30)] + [f"zzz {number},bad" for number in range(30)]
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return file
