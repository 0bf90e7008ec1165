"""Broken adapter folders by the hundred: each ends in one line and exit code 2, or works; nothing given is touched."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from tests.cli import fuzz


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def adapter(request, tmp_path_factory, llama, book) -> Path:
    """A trained adapter of each method."""
    from loretta.__main__ import main

    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    command = f"finetune --model {llama} --data {book} --method {request.param} --output {folder} --steps 1"
    assert main([*command.split(), "--seq-len", "16", "--eval-limit", "1", "--save-steps", "0"]) == 0
    return folder


def cases(adapter: Path, kind: str, mark: Path):
    def damaged(name: str, count: int):
        data = (adapter / name).read_bytes()
        return ((what, fuzz.replace_file(name, new)) for what, new in fuzz.damaged_bytes(data, len(name), count))

    if kind == "config":
        return fuzz.json_cases(adapter, fuzz.CONFIG, 0, 2)
    if kind == "config-bytes":
        return damaged(fuzz.CONFIG, 6)
    if kind == "record":
        return itertools.chain(fuzz.json_cases(adapter, fuzz.RECORD, 1, 1), damaged(fuzz.RECORD, 3))
    if kind == "tensors":
        return fuzz.tensor_cases(adapter, 2, 5)
    return itertools.chain(
        damaged(fuzz.WEIGHTS, 12),
        [
            ("a pickle that runs code", fuzz.hostile_pickle(mark)),
            *((f"a folder for {name}", fuzz.instead_of_file(name)) for name in (fuzz.WEIGHTS, fuzz.CONFIG)),
            *((f"no {name}", fuzz.without_file(name)) for name in (fuzz.WEIGHTS, fuzz.CONFIG, fuzz.RECORD)),
        ],
    )


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        ("adp", "config"), ("rep", "config"), ("adp", "tensors"), ("rep", "tensors"),
        ("adp", "config-bytes"), ("adp", "record"), ("rep", "weights"),  # bytes, in which the methods do not differ
    ],
    indirect=["adapter"],
)  # fmt: skip
def test_a_broken_adapter_ends_in_one_line(kind, adapter, llama, book, loretta, tmp_path):
    mark, broken = tmp_path / "the pickle ran", tmp_path / "broken"
    model_before = hashes(llama)
    complaints, worked, count = [], 0, 0
    for what, break_it in cases(adapter, kind, mark):
        shutil.copytree(adapter, broken)
        break_it(broken)
        before, count = hashes(broken), count + 1
        arguments = ("eval", "--adapter", broken, "--data", book, "--eval-limit", 1, "--seq-len", 16, "--json")
        wrong, out = fuzz.complaint(loretta, *arguments)
        if wrong:
            complaints.append(f"{what}: {wrong}")
        elif out:
            worked += 1
            assert json.loads(out)["loss"] < 100, what
        assert hashes(broken) == before, what
        shutil.rmtree(broken)
    assert not complaints, "\n".join(complaints)
    assert not mark.exists()
    assert hashes(llama) == model_before
    assert worked < count * 4 / 5, "hardly anything was refused: do the cases still break what they name?"
