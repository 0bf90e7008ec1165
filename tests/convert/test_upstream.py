"""Folders that the released package wrote give the same logits once converted.

The committed ones were written by running it (write_upstream.py); with LORETTA_UPSTREAM set to a folder made by
``pip install --no-deps --target FOLDER loretta==0.1.0`` it is run anew, on more cases.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file

from loretta.convert import MissingParameters, convert_upstream
from loretta.layer import LorettaLayer

from . import bases

FIXTURES = Path(__file__).with_name("fixtures")
WHEEL = os.environ.get("LORETTA_UPSTREAM")


def expected(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """The released package's logits, and what it trained but did not save."""
    content = json.loads((folder / "expected.json").read_text())
    return torch.tensor(content["logits"]), content["trained_but_not_saved"]


def assert_same_logits(folder: Path, name: str, out: Path) -> None:
    """Convert the folder and compare logits; a case whose save_pretrained left parts out takes the base's."""
    wanted, lost = expected(folder)
    complete = bases.CASES[name][4]
    if lost and not complete:
        with pytest.raises(MissingParameters) as refusal:
            convert_upstream(folder, out, bases.base_config(name))
        assert refusal.value.names == lost
        assert all(parameter in str(refusal.value) for parameter in lost)
        assert not out.exists()
    done = convert_upstream(folder, out, bases.base_config(name), missing="refuse" if complete else "base")
    assert done.from_base == ([] if complete else lost)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    base = bases.base_model(name)
    without = bases.logits(base)
    result = bases.logits(PeftModel.from_pretrained(base, out).eval())
    torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
    assert (without - wanted).abs().max() > 0.05  # the adapter matters, so its conversion is what was tested


@pytest.mark.parametrize("name", bases.COMMITTED)
def test_a_committed_folder_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    assert_same_logits(FIXTURES / name, name, tmp_path / "converted")


@pytest.fixture(scope="module")
def written_now(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released package, run now, on every case."""
    out = tmp_path_factory.mktemp("upstream")
    script = Path(__file__).with_name("write_upstream.py")
    environment = os.environ | {"PYTHONPATH": str(WHEEL)}
    subprocess.run([sys.executable, str(script), str(out)], check=True, env=environment, cwd=out)
    return out


@pytest.mark.skipif(not WHEEL, reason="LORETTA_UPSTREAM names no folder with the released package in it")
@pytest.mark.parametrize("name", bases.CASES)
def test_a_folder_written_now_gives_the_same_logits(name: str, written_now: Path, tmp_path: Path) -> None:
    assert_same_logits(written_now / name, name, tmp_path / "converted")


def test_on_a_bond_the_cores_keep_their_bits_and_off_it_the_config_holds_the_ranks(tmp_path: Path) -> None:
    convert_upstream(FIXTURES / "llama-adp", tmp_path / "adp", bases.base_config("llama-adp"))
    before = torch.load(FIXTURES / "llama-adp" / "adapter_model.bin", weights_only=True)
    after = load_file(tmp_path / "adp" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.mlp.down_proj"
    cores = [before[f"{module}.adapter_down.layer.tensor.factors.{number}"].flatten() for number in range(4)]
    assert torch.equal(after[f"{module}.loretta_adp_down.cores"], torch.cat(cores))

    convert_upstream(FIXTURES / "llama-rep-straddling", tmp_path / "rep", bases.base_config("llama-rep-straddling"))
    config = PeftConfig.from_pretrained(tmp_path / "rep")
    assert config.tensor_rank == 2
    assert config.matrix_shapes["1024x8"] == {"in_modes": [4, 8, 8, 4], "out_modes": [2, 4], "ranks": [2, 2, 2, 4, 2]}


def test_the_base_can_be_a_folder_and_then_the_adapter_loads_by_itself(tmp_path: Path) -> None:
    bases.base_model("llama-rep-straddling").save_pretrained(tmp_path / "base")
    convert_upstream(FIXTURES / "llama-rep-straddling", tmp_path / "rep", str(tmp_path / "base"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "rep").eval()
    assert any(isinstance(module, LorettaLayer) for module in model.modules())
    wanted, _ = expected(FIXTURES / "llama-rep-straddling")
    torch.testing.assert_close(bases.logits(model), wanted, rtol=1e-5, atol=1e-5)


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def damaged(tmp_path: Path):
    """A copy of a good folder, and a way to change its tensors or its config."""
    folder = tmp_path / "damaged"
    shutil.copytree(FIXTURES / "llama-rep-straddling", folder)

    def change(tensors=None, **config) -> Path:
        if tensors is not None:
            content = torch.load(folder / "adapter_model.bin", weights_only=True)
            content = tensors(content)
            torch.save(content, folder / "adapter_model.bin")
        if config:
            file = folder / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return change


def convert(folder: Path) -> None:
    convert_upstream(folder, folder.parent / "out", bases.base_config("llama-rep-straddling"))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(damaged, tmp_path: Path) -> None:
    folder = damaged(lambda tensors: tensors | {"x": Hostile(tmp_path / "ran")})
    with pytest.raises(ValueError, match=r"adapter_model\.bin: refused: .* can run code"):
        convert(folder)
    assert not (tmp_path / "ran").exists()


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.layer"


def added(key: str, value) -> dict:
    return {"tensors": lambda tensors: tensors | {key: value}}


def without(part: str) -> dict:
    return {"tensors": lambda tensors: {key: value for key, value in tensors.items() if part not in key}}


DAMAGES = {
    "a-factor-is-missing": (without(".q_proj.lora_A"), "no value for .*q_proj.loretta_rep_A.cores"),
    "a-core-is-missing": (without(f"{A}.tensor.factors.1"), r"q_proj.lora_A has the cores \[0, 2"),
    "ranks-do-not-meet": (added(f"{A}.tensor.factors.0", torch.zeros(1, 4, 3)), "q_proj.lora_A: .* no tensor train"),
    "another-size": (added(f"{A}.tensor.factors.0", torch.zeros(1, 5, 2)), "q_proj"),
    "a-matrix-for-a-core": (added(f"{A}.tensor.factors.0", torch.zeros(4, 2)), "q_proj.lora_A: .* no tensor train"),
    "nan": (added(f"{A}.tensor.factors.0", torch.full((1, 4, 2), float("nan"))), "finite"),
    "a-scalar": (added(f"{A}.bias", torch.tensor(1.0)), "finite floating-point"),
    "a-bias-alone": (added("base_model.model.x.layer.bias", torch.ones(3)), "no cores beside the biases of x"),
    "a-tensor-without-a-place": (
        added("base_model.model.lm_head.weight", torch.zeros(31, 1024)),
        "lm_head.weight has no place",
    ),
    "one-norm-only": (added("base_model.model.model.norm.weight", torch.ones(1024)), "no value for .*input_layernorm"),
    "a-foreign-key": (added("model.norm.weight", torch.zeros(1024)), "does not start with"),
    "a-list": ({"tensors": list}, "a dict of tensors"),
    "a-number": (added("x", 1), "'x' is a int"),
    "another-r": ({"r": 7}, "side of 7"),
    "r-as-text": ({"r": "8"}, "side of 8"),
    "another-method": ({"peft_type": "PREFIX_TUNING"}, "not an adapter of the released loretta"),
    "a-plain-lora": ({"peft_type": "LORA", "use_dora": False}, "does not write: use_dora"),
    "an-unknown-task": ({"task_type": "LM"}, "task_type is 'LM'"),
    "a-broken-regex": ({"target_modules": "("}, "no regular expression"),
    "no-alpha": ({"lora_alpha": None}, "lora_alpha"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_named_with_what_is_wrong(damaged, change, message: str, tmp_path: Path) -> None:
    folder = damaged(**change)
    with pytest.raises(ValueError, match=message):
        convert(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_file_is_named(damaged, size: int) -> None:
    folder = damaged()
    file = folder / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        convert(folder)


def test_what_is_not_there_or_in_the_way_is_named(damaged, tmp_path: Path) -> None:
    folder = damaged(base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say what its base model is"):
        convert_upstream(folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds something"):
        convert_upstream(folder, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin: no such file"):
        convert(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert(folder)
