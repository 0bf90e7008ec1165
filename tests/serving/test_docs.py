"""The documentation's blocks run as written, top to bottom, on a tiny model; those marked "not run" are skipped."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.__main__ import main
from loretta.convert.trains import normal_form
from loretta.targets import FAMILIES
from tests.convert import bases

DOCS = Path(__file__).parents[2] / "docs"
FIXTURES = Path(__file__).parents[1] / "convert" / "fixtures"
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of a page that are run, each with its language."""
    found = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    return [(language, text) for skipped, language, text in found if not skipped]


def run_page(page: str) -> dict[str, Any]:
    """Run a page's blocks in the current folder; the names its Python left."""
    return run_blocks(page, blocks(page), {})


def run_blocks(page: str, found: list[tuple[str, str]], names: dict[str, Any]) -> dict[str, Any]:
    """Run blocks of a page, its Python with these names, to which it adds."""
    for language, text in found:
        if language == "python":
            exec(compile(text, page, "exec"), names)
            continue
        assert language == "bash"
        for command in text.splitlines():
            words = shlex.split(command, comments=True)
            assert words[0] == "loretta", command
            assert main(words[1:]) == 0, command
    return names


def save_base(folder: Path) -> None:
    """A small Llama with a tokenizer of words."""
    words = ["<pad>", "</s>", "<unk>", "the", "cat", "dog", "lay", "sat", "on", "mat", "log"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def save_adapter(base: Path, config: Any, folder: Path) -> None:
    """A random adapter on the saved base, as a training leaves it."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "cores" not in name:
            nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_serve(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    common = {"task_type": "CAUSAL_LM", "init_weights": False}
    save_adapter(tmp_path / "base", LorettaRepConfig(**common), tmp_path / "runs" / "rep")
    save_adapter(tmp_path / "base", LorettaAdpConfig(**common), tmp_path / "runs" / "adp")
    quiet = LorettaRepConfig(**common, train_layernorm=False)
    save_adapter(tmp_path / "base", quiet, tmp_path / "runs" / "rep-without-norms")
    names = run_page("serve.md")
    merged, as_it_is = [line for line in capsys.readouterr().out.splitlines() if line.startswith("['the cat")]
    assert merged == as_it_is
    assert names["words"].shape[0] == 2
    assert names["report"].worst < 1e-5
    assert (tmp_path / "runs" / "small" / "adapter_model.safetensors").exists()


def test_move_from_upstream(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bases.base_model("llama-adp").save_pretrained(tmp_path / "base")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old").symlink_to(FIXTURES / "llama-adp")
    run_page("from-upstream.md")
    said = capsys.readouterr().out
    assert "adp {'8x768': TTShape(in_modes=(8,), out_modes=(8, 12, 8), ranks=(5, 5, 5), gains=(0, 0))} []" in said
    assert "trainable params: " in said


def test_the_complete_folder_of_the_page_is_what_the_fixtures_were_written_with() -> None:
    page = (DOCS / "from-upstream.md").read_text()
    way = re.search(r"tensors = \{.*\}", page)
    assert way is not None
    assert way[0] in (FIXTURES.parent / "write_upstream.py").read_text()


def test_the_shapes_of_the_page_are_the_converters() -> None:
    page = (DOCS / "from-upstream.md").read_text()
    rows = re.findall(r"^\| (\d+) x (\d+) \| ([\d·]+) \| ([\d·]+) \\\| ([\d·]+) \| ([\d, ]+) \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for in_features, out_features, *modes, ranks in rows:
        released, in_modes, out_modes = (tuple(map(int, part.split("·"))) for part in modes)
        bonds = [1, *[5] * (len(released) - 1), 1]
        cores = [torch.ones(r, n, s) for r, n, s in zip(bonds, released, bonds[1:], strict=False)]
        _, shape = normal_form(cores, int(in_features), int(out_features))
        assert (shape.in_modes, shape.out_modes) == (in_modes, out_modes)
        assert shape.ranks == tuple(map(int, ranks.split(", ")))


def test_add_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(FAMILIES)
    try:
        names = run_page("add-a-family.md")
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)
    assert "gate_proj" in capsys.readouterr().out
    adapted = [name for name, module in names["adp"].named_modules() if hasattr(module, "loretta_adp_up")]
    assert len(adapted) == 6
    layer = names["adp"].get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    assert layer.placement == {"default": "mh_adapter"}
    adapted = [name for name, module in names["blocks"].named_modules() if hasattr(module, "loretta_adp_up")]
    assert [name.split("layers.")[1] for name in adapted] == ["0.mlp.loretta_block", "1.mlp.loretta_block"]
