"""`loretta finetune` in two processes: as one process with the same global batch, and one voice, one folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch.testing import assert_close

from loretta.cli import distributed
from loretta.cli.report import UserError
from tests.distributed.launching import FSDP2, HERE, ZERO3, torchrun
from tests.distributed.test_engines import NEEDS_DEEPSPEED

METHODS = {"adp": ["--bottleneck", 8], "rep": ["--r", 4, "--dropout", 0]}
LAUNCHES = {
    "ddp": (("-m", "--", "loretta"), {}),
    "fsdp2": (("--", HERE / "on_cpu.py"), FSDP2),
    "zero3": (("--", HERE / "on_cpu.py"), ZERO3),
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Completions of several lengths, so that the processes' shares count different numbers of tokens."""
    file = tmp_path_factory.mktemp("data") / "ask.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": "abcdefghijk"[: 2 + n % 7]} for n in range(44)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("ddp", "adp"),
        ("fsdp2", "rep"),
        pytest.param("ddp", "rep", marks=pytest.mark.slow),
        pytest.param("fsdp2", "adp", marks=pytest.mark.slow),
        pytest.param("zero3", "adp", marks=NEEDS_DEEPSPEED),
        pytest.param("zero3", "rep", marks=NEEDS_DEEPSPEED),
    ],
)
def test_equals_one_process_with_the_same_global_batch(loretta, llama, questions, tmp_path, engine, method) -> None:
    command = ["finetune", "--model", llama, "--data", questions, "--method", method, *METHODS[method], "--json"]
    command += ["--seq-len", 32, "--steps", 3, "--save-steps", 2, "--eval-fraction", 0.2]
    alone = loretta(*command, "--batch-size", 4, "--output", tmp_path / "alone").result()

    (start, variables), out = LAUNCHES[engine], tmp_path / "out"
    ran = torchrun(*start, *command, "--batch-size", 2, "--output", out, **variables)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    result = json.loads(said[0])
    assert len(said) == 1
    assert ran.stderr.count("before: perplexity") == 1
    assert ran.stderr.count("all parameters are sharded") == (0 if engine == "ddp" else 2)
    assert result["processes"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]

    for when in ("before", "after"):
        assert result[when]["loss"] == pytest.approx(alone[when]["loss"], rel=1e-6)
    weights, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "alone"))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)
    for name in ("base_parameters", "trainable_parameters", "steps"):
        assert result[name] == alone[name]


@pytest.mark.parametrize(
    ("engine", "saved"),
    [
        pytest.param("fsdp2", torch.float32, marks=pytest.mark.slow),
        pytest.param("zero3", torch.bfloat16, marks=NEEDS_DEEPSPEED),
    ],
)
def test_a_bfloat16_base_learns(llama, questions, tmp_path, engine, saved) -> None:
    (start, variables), out = LAUNCHES[engine], tmp_path / "out"
    if engine == "zero3":
        variables = variables | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(HERE.parents[1] / "configs" / "zero3.json")}
    command = ["finetune", "--model", llama, "--data", questions, "--method", "adp", *METHODS["adp"], "--json"]
    command += ["--steps", 6, "--batch-size", 2, "--grad-accum", 2, "--gradient-checkpointing", "--output", out]
    ran = torchrun(*start, *command, "--dtype", "bfloat16", **variables)
    assert ran.returncode == 0, ran.stderr
    (result,) = (json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{"))
    assert result["after"]["loss"] < result["before"]["loss"] - 0.05
    assert {value.dtype for value in load_file(out / "adapter_model.safetensors").values()} == {saved}


@pytest.fixture
def one_of_two(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """This process as the first of two that a launcher started."""
    PartialState._reset_state()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    PartialState._reset_state()


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_refuses_processes_that_accelerate_leaves_alone(one_of_two, engine) -> None:
    one_of_two.setattr(distributed, "PartialState", _alone)
    one_of_two.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(UserError, match=f"one of 2 processes, but accelerate connected 1: {engine} needs"):
        distributed.connect()


def _alone(cpu: bool) -> PartialState:
    """accelerate's state where it finds no accelerator: its very own, but that DeepSpeed connects on its side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_RANK")
        return PartialState(cpu=cpu)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_refuses_sharding_on_cpu(one_of_two, engine) -> None:
    one_of_two.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    one_of_two.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=f"{engine} was asked for together with use_cpu"):
        distributed.connect()


@pytest.mark.slow
def test_refuses_what_accelerate_would_not_connect(llama, questions, tmp_path) -> None:
    """The same as its user meets it: nothing is written, and one line says why."""
    command = ["finetune", "--model", llama, "--data", questions, "--method", "adp", "--output", tmp_path / "out"]
    ran = torchrun("-m", "--", "loretta", *command, **FSDP2)
    assert ran.returncode != 0
    assert ran.stderr.count("loretta finetune: error: this is one of 2 processes, but accelerate connected 1") == 1
    assert list(tmp_path.iterdir()) == []
