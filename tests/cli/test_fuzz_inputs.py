"""Broken data files, options and configurations by the hundred: one line and exit code 2, or it works."""

import json
import random

import pytest

from loretta import LorettaAdpConfig, LorettaRepConfig
from loretta.cli.parser import make_parser
from tests.cli import fuzz

DATA = {
    "text.txt": "the cat sat on the mat. " * 40,
    "rows.jsonl": '{"prompt": "one", "completion": " two"}\n' * 12,
    "chat.jsonl": json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    + "\n",
    "labels.csv": "text,label\n" + "aaa,x\nbbb,y\n" * 12,
}
FAST = ["--steps", "1", "--seq-len", "16", "--eval-limit", "1", "--save-steps", "0", "--batch-size", "2"]


@pytest.mark.parametrize("name", DATA)
def test_a_broken_data_file_ends_in_one_line(name, llama, loretta, tmp_path):
    task = "seq_cls" if name.endswith("csv") else "causal_lm"
    file, output, complaints = tmp_path / name, tmp_path / "out", []
    for what, data in fuzz.damaged_bytes(DATA[name].encode(), len(name), 5):
        file.write_bytes(data)
        arguments = ("--model", llama, "--data", file, "--task", task, "--method", "adp", "--output", output)
        if wrong := fuzz.complaint(loretta, "finetune", *arguments, *FAST)[0]:
            complaints.append(f"{what}: {wrong}")
        assert file.read_bytes() == data, what
    assert not complaints, "\n".join(complaints)


def options() -> list[str]:
    """The options of `loretta finetune` that take a value."""
    actions = make_parser()._subparsers._group_actions[0].choices["finetune"]._actions
    return sorted(action.option_strings[-1] for action in actions if action.option_strings and action.nargs != 0)


def test_a_wrong_option_ends_in_one_line(llama, loretta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a value may be a folder's name
    (tmp_path / "text.txt").write_text(DATA["text.txt"])
    values = ("", "-1", "0", "1e400", "nan", "x", "9" * 30, "\x00", "../none", "--", "é", "0.5")
    draw, complaints = random.Random(0), []
    given = {"--model": llama, "--data": tmp_path / "text.txt", "--output": tmp_path / "out"}
    for option in options():
        for value in draw.sample(values, 4):
            method = draw.choice(["adp", "rep"])
            arguments = ["--method", method, *FAST] + [str(v) for pair in given.items() for v in pair]
            if wrong := fuzz.complaint(loretta, "finetune", *arguments, option, value)[0]:
                complaints.append(f"{option} {value!r}: {wrong}")
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("config", [LorettaAdpConfig, LorettaRepConfig])
def test_a_wrong_field_of_a_config_raises_and_names_it(config):
    ours = set(config.__dataclass_fields__) - set(config.__mro__[2].__dataclass_fields__)
    refused, unclear = 0, []
    for name in sorted(ours):
        for value in (*fuzz.VALUES, float("nan"), float("inf"), object(), b"x"):
            try:
                config(**{name: value})
            except (TypeError, ValueError) as error:
                refused += 1
                if name not in str(error):
                    unclear.append(f"{name}={value!r}: {error}")
            except Exception as error:
                unclear.append(f"{name}={value!r}: {error!r}")
    assert not unclear, "\n".join(unclear)
    assert refused > 150
