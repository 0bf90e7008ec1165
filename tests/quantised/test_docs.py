"""The page about one GPU: its Python runs as written on a tiny model, and the command line knows its commands."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loretta import PeftModel
from loretta.__main__ import make_parser

from .bases import save_llama

PAGE = (Path(__file__).parents[2] / "docs" / "one-gpu-qlora.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("command", re.findall(r"^loretta .*$", PAGE, re.MULTILINE))
def test_the_command_line_knows_every_command(command: str) -> None:
    make_parser().parse_args(shlex.split(command)[1:])


def test_python_blocks_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for package in ("bitsandbytes", "datasets"):
        pytest.importorskip(package)
    trl = pytest.importorskip("trl")
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, use_cpu=True))
    folder = save_llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def tiny(name: str, **options: Any) -> Any:
        assert name == "meta-llama/Llama-2-7b-hf"
        return load(folder, **options)

    def words(name: str) -> Any:
        words = {"<unk>": 0, "<pad>": 1, "</s>": 2, "2": 3, "4": 4, "+": 5, "=": 6}
        inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", words)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)
    assert "trainable params: " in capsys.readouterr().out
    for saved in ("runs/llama-adp", "runs/sft"):
        PeftModel.from_pretrained(tiny("meta-llama/Llama-2-7b-hf"), saved)
