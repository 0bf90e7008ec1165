"""What a user gets wrong is one line on stderr and exit code 2, and it is said before anything is loaded."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loretta import LorettaAdpConfig, LorettaRepConfig
from loretta.cli.parser import COMMANDS, METHOD_OPTIONS

GOOD_DATA = '{"text": "some words to learn from, and some more"}\n' * 4


@pytest.fixture
def workplace(tmp_path, llama, monkeypatch) -> Path:
    """A folder with a model, data and an adapter-like folder, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(llama)
    (tmp_path / "data.jsonl").write_text(GOOD_DATA)
    (tmp_path / "broken.jsonl").write_text(GOOD_DATA + "{\n")
    (tmp_path / "labels.csv").write_text("text,label\na,x\nb,y\nc,x\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    return tmp_path


FINETUNE = {"--model": "llama", "--data": "data.jsonl", "--method": "adp", "--output": "out"}
WRONG = {
    "no-data-file": ({"--data": "none.txt"}, "none.txt: no such file"),
    "malformed-line": ({"--data": "broken.jsonl"}, "broken.jsonl:5: not valid JSON"),
    "no-eval-file": ({"--eval-data": "none.txt"}, "none.txt: no such file"),
    "eval-data-of-another-kind": (
        {"--data": "labels.csv", "--task": "seq_cls", "--eval-data": "data.jsonl"},
        "data.jsonl:1",
    ),
    "no-such-folder": ({"--model": "./none"}, "./none: no such model folder"),
    "unknown-hub-id": ({"--model": "some/body"}, "some/body: no such folder, and no such tokenizer on the hub"),
    "no-model-in-folder": ({"--model": "empty"}, "empty: no model in this folder (no config.json)"),
    "gguf-not-named": ({"--model": "gguf"}, "it has model.gguf: name one with --gguf"),
    "gguf-not-there": ({"--model": "gguf", "--gguf": "x.gguf"}, "gguf: no file x.gguf in it"),
    "gguf-broken": ({"--model": "gguf/model.gguf"}, "the tokenizer cannot be loaded"),
    "no-method-of-that-name": ({"--method": "lora"}, "argument --method: invalid choice: 'lora'"),
    "option-of-the-other-method": ({"--alpha": "3"}, "--alpha belongs to --method rep, not adp"),
    "refused-by-the-config": ({"--rank": "0"}, "tensor_rank must be an integer of at least 1, got 0 (--rank)"),
    "activation": ({"--activation": "cos"}, "non_linearity must be one of 'relu'"),
    "no-such-target": ({"--target-modules": "nowhere"}, "the method does not fit this model"),
    "steps": ({"--steps": "0"}, "argument --steps: must be a whole number of at least 1, not '0'"),
    "lr": ({"--lr": "nan"}, "argument --lr: must be a number above 0, not 'nan'"),
    "eval-fraction": ({"--eval-fraction": "1"}, "argument --eval-fraction: must be a number between 0 and 1"),
    "steps-and-epochs": ({"--steps": "2", "--epochs": "2"}, "not allowed with argument"),
    "more-than-the-positions": ({"--seq-len": "65"}, "--seq-len 65 is more than the 64 positions"),
    "output-of-somebody-else": ({"--output": "foreign"}, "foreign: is in use by something else"),
    "output-is-a-file": ({"--output": "data.jsonl"}, "data.jsonl: is not a folder to write to"),
    "nothing-to-resume": ({"--resume": None}, "out: nothing to resume: no complete checkpoint there"),
    "no-such-column": ({"--columns": "text=body"}, "data.jsonl:1: no column 'body' (--columns); it has text"),
    "column-for-nothing": (
        {"--columns": "body=text"},
        "argument --columns: must be NAME=COLUMN with NAME one of",
    ),
    "no-such-optimiser": ({"--optim": "adam_and_eve"}, "adam_and_eve is not a valid OptimizerNames"),
    "no-such-tracker": ({"--report-to": "diary"}, "diary is not supported, only"),
    "tracker-not-installed": ({"--report-to": "comet_ml"}, "requires comet-ml"),
    "float16-on-a-cpu": ({"--dtype": "fp16"}, "--dtype float16 trains on accelerators only"),
    "packed-classes": (
        {"--data": "labels.csv", "--task": "seq_cls", "--packing": None},
        "--packing is for rows of a language model",
    ),
    "no-such-dtype": ({"--dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
    "option-misspelt": ({"--step": "3"}, "unrecognized arguments: --step"),
}

OTHERS = {
    "no-command": ([], "the following arguments are required: COMMAND"),
    "unknown-command": (["train"], "argument COMMAND: invalid choice: 'train'"),
    "eval-of-nothing": (["eval", "--data", "data.jsonl"], "give --model, --adapter, or both"),
    "eval-of-no-adapter": (["eval", "--adapter", "empty", "--data", "data.jsonl"], "empty: no adapter there"),
    "merge-of-no-adapter": (["merge", "--adapter", "none", "--output", "out"], "none: no adapter there"),
    "export-of-no-adapter": (["export", "--adapter", "none", "--output", "out"], "none: no adapter there"),
    "params-of-no-model": (["params", "--model", "some/body", "--method", "adp"], "presets: llama-2-7b"),
    "params-of-a-strange-config": (
        ["params", "--model", "config.json", "--method", "adp"],
        "config.json: is no model config",
    ),
}


def expect_one_line(ran, command: str, message: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith(f"loretta{command}: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_finetune_refuses_in_one_line(loretta, workplace, change, message) -> None:
    before = sorted(workplace.iterdir())
    words = [word for pair in (FINETUNE | change).items() for word in pair if word is not None]
    ran = loretta("finetune", *words)
    expect_one_line(ran, " finetune" if "--step" not in change else "", message)
    assert sorted(workplace.iterdir()) == before


@pytest.mark.parametrize(("arguments", "message"), OTHERS.values(), ids=OTHERS)
def test_other_commands_refuse_in_one_line(loretta, workplace, arguments, message) -> None:
    expect_one_line(loretta(*arguments), f" {arguments[0]}" if len(arguments) > 1 else "", message)


@pytest.mark.parametrize("package", ["matplotlib", "gguf"])
def test_a_missing_optional_package_is_named(loretta, workplace, package, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    change = ["--plot"] if package == "matplotlib" else ["--model", "gguf", "--gguf", "model.gguf"]
    words = [word for pair in FINETUNE.items() for word in pair]
    expect_one_line(loretta("finetune", *words, *change), " finetune", f"needs the package {package}: pip install")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_shows_an_example_of_the_command(loretta, command) -> None:
    ran = loretta(*([command] if command else []), "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"\n  loretta {command or 'finetune'} " in ran.out


def test_help_imports_no_library(tmp_path) -> None:
    code = f"""
import sys
from loretta.__main__ import main
for command in {[*COMMANDS]}:
    assert main([command, "--help"]) == 0
assert main(["finetune", "--lr", "much"]) == 2
slow = {{"torch", "numpy", "transformers", "peft"}} & sys.modules.keys()
sys.exit(f"imported {{slow}}" if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _defaults() -> list[tuple[str, str, str]]:
    """Every hyper-parameter with a default that the help tells: the option, the method, the default."""
    configs = {"adp": LorettaAdpConfig(), "rep": LorettaRepConfig()}
    found = []
    for flag, option in METHOD_OPTIONS.items():
        for method, config in configs.items():
            field = option.get(method)
            value = getattr(config, field) if field else None
            if field == "init_weights":
                value = {True: "identity"}[value]
            if value is not None and not isinstance(value, bool):
                found.append((flag, method, str(value)))
    return found


@pytest.mark.parametrize(("flag", "method", "default"), _defaults())
def test_help_tells_the_defaults_of_the_configurations(flag, method, default) -> None:
    text = METHOD_OPTIONS[flag]["help"]
    told = re.search(r"\(default (\S+?)(?:, rep: (\S+))?\)", text)
    assert told is not None, text
    assert default == (told[2] if method == "rep" and told[2] else told[1])


def test_a_program_error_is_not_hidden(loretta, monkeypatch) -> None:
    monkeypatch.setattr("loretta.cli.plan.count_groups", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loretta("params", "--model", "llama-2-7b", "--method", "rep")


def test_an_interrupt_is_one_line(loretta, monkeypatch) -> None:
    def interrupted(model) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loretta.cli.plan.count_groups", interrupted)
    ran = loretta("params", "--model", "llama-2-7b", "--method", "rep")
    assert (ran.code, ran.err.strip()) == (130, "loretta params: interrupted")


def test_the_module_runs_and_no_other_library_prints(workplace) -> None:
    """In a new process: most libraries print when they are imported."""
    code = """
import runpy, sys, loretta
assert not any(name.startswith("loretta.cli") for name in sys.modules)
runpy.run_module("loretta", run_name="__main__")
"""
    arguments = ["finetune", "--model", "none", "--data", "none.txt", "--method", "adp", "--output", "out"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "loretta finetune: error: none.txt: no such file\n"
