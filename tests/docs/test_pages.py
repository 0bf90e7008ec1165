"""The pages that have no test of their own: their links lead somewhere, and their Python runs as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loretta_kernels import TT, TTShape, tt_adapter

ROOT = Path(__file__).parents[2]
IGNORED = {".venv", ".cache", "build", "site", "runs"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not IGNORED.intersection(path.relative_to(ROOT).parts)
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in target]
    for target in targets:
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["determinism", "many-adapters", "methods", "plain-pytorch"])
def test_python_runs_as_written(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL):
        exec(block, names)
    if page == "plain-pytorch":
        assert names["loss"].item() < 1.5  # from 2.3, of ten classes
        assert (tmp_path / "model.pt").is_file()


def test_the_pages_on_the_api_have_arguments_and_examples(tmp_path: Path) -> None:
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("loretta_kernels", "loretta_kernels.nn", "!loretta_kernels.explain", output_directory=tmp_path)
    functions, layers = ((tmp_path / f"loretta_kernels{page}.html").read_text(encoding="utf-8") for page in ("", "/nn"))
    for page, name in ((functions, "tt_adapter"), (functions, "TTShape"), (layers, "TTLoRA")):
        (section,) = re.findall(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
        assert "Arguments:" in section
        assert "Example:" in section


def test_the_operators_come_without_transformers_and_peft() -> None:
    work = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "peft", "accelerate", "safetensors", "numpy")))
import loretta_kernels.nn
assert not [name for name in sys.modules if name.split(".")[0] == "loretta"]
"""
    done = subprocess.run([sys.executable, "-c", work], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_same_call_gives_the_same_bits_on_a_cpu() -> None:
    down, up = TTShape.for_matrix(1024, 64, 5), TTShape.for_matrix(64, 1024, 5)
    cores = [(0.2 * torch.randn(shape.num_params)).requires_grad_() for shape in (down, up)]
    x = torch.randn(300, 1024, requires_grad=True)
    runs = []
    for _ in range(3):
        y = tt_adapter(x, TT(cores[0], down), TT(cores[1], up), residual=x, dropout_p=0.3, seed=5)
        runs.append((y, *torch.autograd.grad(y.square().sum(), [x, *cores])))
    for run in runs[1:]:
        assert all(torch.equal(first, again) for first, again in zip(runs[0], run, strict=True))
