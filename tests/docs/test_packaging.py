"""The distribution of the operators alone, and what the three places that name a version say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "packaging" / "kernels" / "pyproject.toml"
OTHERS = ("transformers", "peft", "accelerate", "safetensors", "numpy", "loretta")


def test_every_place_names_the_same_version_and_the_same_torch() -> None:
    ours, kernels = (path.read_text() for path in (ROOT / "pyproject.toml", KERNELS))
    citation = (ROOT / "CITATION.cff").read_text()
    versions = [re.search(r'^version[ :=]+"?([\d.]+)', text, re.MULTILINE) for text in (ours, kernels, citation)]
    assert len({found and found[1] for found in versions}) == 1
    torch = [re.search(r'"(torch>=[\d.]+)"', text) for text in (ours, kernels)]
    assert len({found and found[1] for found in torch}) == 1


def test_the_wheel_of_the_operators_trains_without_anything_but_torch(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    for folder in ("loretta_kernels", "packaging/kernels"):  # a copy, since building leaves files behind
        ignored = shutil.ignore_patterns("__pycache__", "build")
        shutil.copytree(ROOT / folder, tmp_path / "repository" / folder, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "repository" / "packaging" / "kernels"
    built = subprocess.run([*pip, "-w", tmp_path, source], text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("loretta_kernels-*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if name.startswith("loretta_kernels/")}
        files.extractall(tmp_path / "site")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "loretta_kernels").rglob("*.py")}
    assert names == sources | {"loretta_kernels/py.typed"}
    work = f"""
import sys
sys.modules.update(dict.fromkeys({OTHERS!r}))
import torch
from loretta_kernels.nn import TTLoRA
layer = TTLoRA(torch.nn.Linear(96, 64), r=8, rank=3)
layer(torch.randn(5, 96)).sum().backward()
assert layer.b.cores.grad.isfinite().all() and layer.b.cores.grad.any()
print(sys.modules["loretta_kernels"].__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", work], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
