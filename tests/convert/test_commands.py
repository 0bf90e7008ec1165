"""`loretta convert` and `loretta compress`: what they print, what they write, what they refuse in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loretta.__main__ import main
from tests.tiny_models import tiny_model

from . import bases

FIXTURES = Path(__file__).with_name("fixtures")


class Ran(NamedTuple):
    """What one command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def command(*arguments: Any) -> Ran:
        capsys.readouterr()
        return Ran(main([str(argument) for argument in arguments]), *capsys.readouterr())

    return command


@pytest.fixture
def base(tmp_path: Path):
    """The folder of a case's base model: its configuration is all that conversion reads."""

    def save(name: str) -> Path:
        bases.base_config(name).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


def test_convert_writes_a_folder_that_loads(run, base, tmp_path: Path) -> None:
    name = "llama-rep-straddling"
    ran = run("convert", "--from", "upstream", FIXTURES / name, "--out", tmp_path / "new", "--model", base(name))
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].startswith("rep adapter")
    assert "1024x8       (4, 8, 8, 4) x (2, 4), ranks (2, 2, 2, 4, 2)" in ran.out
    model = PeftModel.from_pretrained(bases.base_model(name), tmp_path / "new").eval()
    wanted = torch.tensor(json.loads((FIXTURES / name / "expected.json").read_text())["logits"])
    torch.testing.assert_close(bases.logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert model.peft_config["default"].base_model_name_or_path == str((tmp_path / "base").resolve())


def test_convert_lists_what_is_missing_and_takes_it_from_the_base_on_request(run, base, tmp_path: Path) -> None:
    words = ("convert", "--from", "upstream", FIXTURES / "roberta-rep", "--out", tmp_path / "new")
    words += ("--model", base("roberta-rep"))
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "roberta.encoder.layer.0.output.LayerNorm.bias" in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    ran = run(*words, "--missing", "base", "--json")
    assert ran.code == 0
    assert len(json.loads(ran.out)["from_base"]) == 6
    assert ran.err.count("left to the base model: roberta.") == 6
    assert json.loads((tmp_path / "new" / "loretta.json").read_text())["labels"] == ["0", "1", "2"]


class Hostile:
    """Unpickled, it would end the process."""

    def __reduce__(self):
        return (exit, (3,))


def test_convert_refuses_in_one_line_and_keeps_what_was_there(run, base, tmp_path: Path) -> None:
    name = "llama-rep-straddling"
    folder = tmp_path / "old"
    shutil.copytree(FIXTURES / name, folder)
    torch.save({"x": Hostile()}, folder / "adapter_model.bin")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for words, message in {
        (folder, "--out", tmp_path / "new", "--model", base(name)): "refused",
        (folder, "--out", folder, "--model", base(name)): "is the adapter itself",
        (FIXTURES / name, "--out", tmp_path / "mine", "--model", base(name)): "in use by something else",
        (FIXTURES / name, "--out", tmp_path / "new"): "does not say what its base model is",
        (FIXTURES / name, "--out", tmp_path / "new", "--model", tmp_path / "none"): "none",
        (tmp_path / "mine", "--out", tmp_path / "new"): "adapter_config.json: no such file",
    }.items():
        ran = run("convert", "--from", "upstream", *words)
        assert ran.code == 2
        assert message in ran.err
        assert ran.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mine", "old"]
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_compress_prints_the_table(run, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    ran = run("compress", tmp_path / "lora", "--rank", 64, "--out", tmp_path / "rep")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == ["layer", "error", "LoRA", "rep"]
    assert [line.split()[0] for line in lines[1:5]] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]
    assert all(float(line.split()[1]) < 1e-5 for line in lines[1:5])
    ran = run("compress", tmp_path / "lora", "--rank", 1, "--out", tmp_path / "rep", "--json")
    assert json.loads(ran.out)["worst"] > 0.01
    ran = run("compress", tmp_path / "rep", "--rank", 1, "--out", tmp_path / "new")
    assert ran.code == 2
    assert "a LoRA adapter is expected, this is 'LORETTA_REP'" in ran.err
