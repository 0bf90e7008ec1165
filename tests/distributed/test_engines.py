"""DDP, FSDP2 and ZeRO-3 in two processes train both methods as one process does, and save what they trained."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from tests.distributed.engines import CONFIGS, loss_sum, make_model, rows, train_alone, trained
from tests.distributed.launching import HERE, torchrun
from tests.tiny_models import tiny_model

NEEDS_DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed: make test-distributed")
RUNS = dict.fromkeys(["ddp", "fsdp2", "fsdp2-bf16"], "without-deepspeed") | {"zero3": "zero3"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The folder that a run of two processes leaves; DDP and FSDP2 share one run, since starting costs the most."""
    folders: dict[str, Path] = {}

    def of(engine: str) -> Path:
        run = RUNS[engine]
        if run not in folders:
            folders[run] = tmp_path_factory.mktemp(run)
            ran = torchrun(HERE / "engines.py", folders[run], *(name for name in RUNS if RUNS[name] == run))
            assert ran.returncode == 0, ran.stderr
        return folders[run]

    return of


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_three_steps_equal_one_process_and_reload(adapters, engine, method) -> None:
    saved = adapters(engine) / f"{engine}-{method}"
    facts = json.loads((saved / "facts.json").read_text())
    alone = train_alone(method)
    parameters = {name: value.detach() for name, value in trained(alone).items()}
    assert facts["world"] == 2
    assert facts["sharded"] == ([True] * len(list(alone.parameters())) if engine != "ddp" else [])

    reloaded = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), saved, is_trainable=True)
    found = {name: value.detach() for name, value in trained(reloaded).items()}
    assert found.keys() == parameters.keys()
    for name, value in found.items():
        assert_close(value, parameters[name], rtol=0, atol=1e-5, msg=name)
    start = trained(make_model(method))
    assert all(not torch.equal(value, start[name]) for name, value in found.items())
    losses = [loss_sum(model.eval(), rows(9))[0] for model in (alone, reloaded)]
    assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", CONFIGS)
def test_fsdp2_trains_norms_in_fp32_beside_a_base_of_sixteen_bits(adapters, method) -> None:
    saved = adapters("fsdp2-bf16") / f"fsdp2-bf16-{method}"
    alone, start = train_alone(method, torch.bfloat16), trained(make_model(method, torch.bfloat16))
    assert json.loads((saved / "facts.json").read_text())["sharded"] == [True] * len(list(alone.parameters()))
    base = tiny_model("llama", num_hidden_layers=1).bfloat16()
    reloaded = PeftModel.from_pretrained(base, saved, is_trainable=True)
    found = trained(reloaded)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in trained(alone).items():
        if "norm" in name:
            assert found[name].ne(start[name]).all()
        # the processes round the gradients of other rows, and Adam makes whole steps of small ones
        error = (found[name] - value).norm() / (value - start[name]).norm()
        assert error < 0.3, (name, error)
