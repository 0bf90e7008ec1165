"""A run killed at any moment and resumed ends with the bits of one that was never killed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loretta.cli.checkpoints import seal
from tests.cli.conftest import write_llama
from tests.resume.killing import run

SEED = 5
IN_CI = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer) -> Path:
    """The folder of a one-layer Llama."""
    return write_llama(tmp_path_factory.mktemp("model"), tokenizer, layers=1)


@pytest.fixture(scope="module")
def command(llama, book) -> list[object]:
    """A run with dropout, so that its random numbers matter, over several epochs."""
    method = ["--method", "rep", "--dropout", 0.3, "--alpha", 32]
    length = ["--seq-len", 32, "--batch-size", 16, "--steps", 14, "--save-steps", 3, "--eval-limit", 4]
    return ["finetune", "--model", llama, "--data", book, *method, *length, "--output"]


class Whole:
    """A run that nobody killed: its result, and how many moments it had."""

    def __init__(self, command: list[object], folder: Path) -> None:
        assert run([*command, folder / "out"], folder / "log") == 0, (folder / "log").read_text()
        self.weights = load_file(folder / "out" / "adapter_model.safetensors")
        self.record = json.loads((folder / "out" / "loretta.json").read_text())
        self.moments = (folder / "log.moments").read_text().splitlines()

    def equals(self, out: Path) -> bool:
        weights = load_file(out / "adapter_model.safetensors")
        record = json.loads((out / "loretta.json").read_text())
        return (
            weights.keys() == self.weights.keys()
            and all(torch.equal(weights[name], self.weights[name]) for name in weights)
            and all(record[name] == self.record[name] for name in ("before", "after", "steps"))
        )


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Whole:
    return Whole(command, tmp_path_factory.mktemp("whole"))


def until_done(command: list[object], out: Path, log: Path) -> None:
    """Go on with a run as its user would."""
    if run([*command, out, "--resume"], log) == 0:
        return
    said = log.read_text().splitlines()[-1]
    if "the run there is finished" in said:
        return
    assert "no complete checkpoint there" in said  # killed before the first step
    assert run([*command, out], log) == 0, log.read_text()


KINDS = ("step ", "torn ", "open ", "os.")


@pytest.mark.parametrize("number", [pytest.param(n, marks=[] if n < IN_CI else [pytest.mark.slow]) for n in range(10)])
def test_a_killed_run_ends_with_the_same_bits(command, whole, tmp_path, number) -> None:
    kind = KINDS[number % len(KINDS)]
    choice = random.Random(SEED + number)
    moment = choice.choice([n for n, name in enumerate(whole.moments) if name.split(" ", 1)[1].startswith(kind)])
    out, log = tmp_path / "out", tmp_path / "log"
    assert run([*command, out], log, die_at=moment) == -9, log.read_text()
    print("killed at", whole.moments[moment])
    until_done(command, out, log)
    assert whole.equals(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.moments", "out"]


def test_a_run_killed_after_its_last_step_trains_no_step_more(command, whole, tmp_path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert run([*command, out], log, die_at="new/adapter_model.safetensors") == -9
    assert run([*command, out, "--resume"], log) == 0, log.read_text()
    assert whole.equals(out)


def test_a_checkpoint_torn_twice_is_never_taken_for_a_good_one(command, whole, tmp_path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    torn = tmp_path / "out.part" / "checkpoints" / "checkpoint-6"
    assert run([*command, out], log, die_at="checkpoint-6/adapter_model.safetensors") == -9
    assert run([*command, out, "--resume"], log, die_at="checkpoint-6/optimizer.pt") == -9  # while it is written again
    assert (torn / "adapter_model.safetensors").exists()
    assert run([*command, out, "--resume"], log) == 0, log.read_text()
    assert log.read_text().count("checkpoint-6: is not complete (its writing was cut short); it is not used") == 2
    assert log.read_text().count("resuming from checkpoint-3") == 2
    assert whole.equals(out)


@pytest.mark.parametrize("lost", ["rng_state.pth", "optimizer.pt"])
def test_a_file_that_is_gone_is_said_and_an_older_checkpoint_used(command, whole, tmp_path, lost) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert run([*command, out], log, die_at="step 8") == -9
    (tmp_path / "out.part" / "checkpoints" / "checkpoint-6" / lost).unlink()
    assert run([*command, out, "--resume"], log) == 0, log.read_text()
    assert f"checkpoint-6: is not complete ({lost} missing); it is not used" in log.read_text()
    assert whole.equals(out)


def test_without_the_random_state_the_bits_differ(command, whole, tmp_path) -> None:
    """The control: what the tests above compare does depend on what is restored."""
    out, log = tmp_path / "out", tmp_path / "log"
    assert run([*command, out], log, die_at="step 8") == -9
    checkpoint = tmp_path / "out.part" / "checkpoints" / "checkpoint-6"
    (checkpoint / "rng_state.pth").unlink()
    seal(checkpoint)
    assert run([*command, out, "--resume"], log) == 0, log.read_text()
    assert "resuming from checkpoint-6" in log.read_text()
    assert not whole.equals(out)
