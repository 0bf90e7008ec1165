"""A run of two processes, one of them killed, resumes to the bits of one that was never killed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import FSDP2, HERE, ZERO3, torchrun
from tests.distributed.test_engines import NEEDS_DEEPSPEED

pytestmark = pytest.mark.slow
ENGINES = {"ddp": {}, "fsdp2": FSDP2, "zero3": ZERO3}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_a_killed_run_ends_with_the_same_bits(llama, book, tmp_path, engine) -> None:
    command = ["finetune", "--model", llama, "--data", book, "--method", "rep", "--dropout", 0.3, "--seq-len", 32]
    command += ["--batch-size", 8, "--steps", 7, "--save-steps", 2, "--eval-limit", 4]

    def run(out: str, die_at: int, *more: str):
        words = [*command, "--output", tmp_path / out, *more]
        return torchrun("--", HERE / "dying.py", *words, DIE_AT=str(die_at), **ENGINES[engine])

    whole = run("whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert run("out", 5).returncode != 0
    assert not (tmp_path / "out").exists()
    resumed = run("out", -1, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from checkpoint-4" in resumed.stderr
    weights, expected = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("out", "whole"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
