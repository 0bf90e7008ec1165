"""Every public function and class has an Example in its docstring, and each runs as written."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import loretta
import loretta_kernels
from loretta_kernels import nn as layers
from loretta_kernels.svd import tt_svd
from tests.convert import bases
from tests.tiny_models import tiny_model

FIXTURES = Path(__file__).parents[1] / "convert" / "fixtures"
LAYERS = [layers.TTLinear, layers.TTLinear.from_linear, layers.TTAdapter, layers.TTLoRA]


def own(package: Any) -> list[Any]:
    """The public functions and classes of a package that are its own."""
    found = [getattr(package, name) for name in package.__all__]
    return [thing for thing in found if callable(thing) and thing.__module__.startswith(package.__name__)]


PUBLIC = [*own(loretta), *own(loretta_kernels), loretta_kernels.TTShape.for_matrix, *LAYERS, tt_svd]
PUBLIC += [loretta_kernels.reference]


def name_of(thing: Any) -> str:
    """A function's, a class's or a module's name."""
    return getattr(thing, "__qualname__", thing.__name__)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What examples may use without an import, and the folders that they read."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", "CAUSAL_LM")
    known = {name: getattr(package, name) for package in (loretta, loretta_kernels) for name in package.__all__}
    known |= {name: getattr(layers, name) for name in ("TTLinear", "TTAdapter", "TTLoRA")}
    return {**known, "torch": torch, "nn": nn, "tt_svd": tt_svd, "model": model}


@pytest.fixture
def folders(tmp_path: Path) -> None:
    """A LoRA, and an adapter of the released package with its base."""
    lora = peft.get_peft_model(tiny_model("llama", "CAUSAL_LM"), peft.LoraConfig(init_lora_weights=False))
    lora.save_pretrained(tmp_path / "runs" / "lora")
    bases.base_model("llama-adp").save_pretrained(tmp_path / "base")
    (tmp_path / "runs" / "old").symlink_to(FIXTURES / "llama-adp")


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("thing", PUBLIC, ids=name_of)
def test_the_example_of_a_public_name_runs(thing: Any, names: dict[str, Any]) -> None:
    text = thing.__doc__ or ""
    assert "Example:\n" in text
    example = doctest.DocTestParser().get_doctest(text, names, name_of(thing), None, None)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)
