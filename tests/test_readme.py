"""The README's Python runs as written, and its commands are ones that the command line knows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import loretta
from loretta.cli.parser import make_parser
from loretta.targets import FAMILIES

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_python_blocks_run_and_print_what_they_say(block: int, monkeypatch, capsys) -> None:
    def meta_llama(name: str, dtype: torch.dtype):
        assert name == "meta-llama/Llama-2-7b-hf"
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(LlamaConfig(), dtype=dtype)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", meta_llama)
    source = BLOCKS[block]
    exec(source, {name: getattr(loretta, name) for name in loretta.__all__})
    for promised in re.findall(r"#\s+(trainable params: .*)", source):
        assert promised in capsys.readouterr().out


COMMANDS = re.findall(r"^loretta .*$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_knows_every_command(command: str) -> None:
    make_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_the_families_named_are_those_of_the_table() -> None:
    named = re.search(r"Known families: (.*?)\.\n", README, re.DOTALL)
    assert named is not None
    assert re.split(r",\s+", named[1]) == list(FAMILIES)
