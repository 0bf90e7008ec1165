"""What is declared is what is needed, and what is tested at its lowest."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Used where it is there: torch brings Triton along, datasets pyarrow, and DeepSpeed is who runs the process.
UNDECLARED = {"triton", "pyarrow", "deepspeed"}


def requirements(section: str) -> dict[str, str]:
    """Package to lowest version ("" where none is declared), of a list or a table of lists in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{re.escape(section)}(.*?)^[\]\[]", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return dict(re.findall(r'"([\w-]+)(?:>=([\d.]+))?(?:;[^"]*)?"', found[1]))


def lowest() -> dict[str, str]:
    """Package to version in constraints-lowest.txt."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def imported() -> set[str]:
    """Every package that loretta and loretta_kernels import, anywhere in them."""
    names = set()
    for path in [*(ROOT / "loretta").rglob("*.py"), *(ROOT / "loretta_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"loretta", "loretta_kernels"}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    needed, optional = requirements("dependencies = ["), requirements("[project.optional-dependencies]")
    assert set(needed) <= imported()
    assert imported() <= set(needed) | set(optional) | UNDECLARED


def test_the_lowest_versions_tested_are_those_declared() -> None:
    declared = {name: version for name, version in requirements("dependencies = [").items() if version}
    tested = lowest()
    assert {name: tested[name].removesuffix(".0") for name in declared} == {
        name: version.removesuffix(".0") for name, version in declared.items()
    }


def test_the_table_of_versions_names_the_lowest_and_the_pinned() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = ["torch", "transformers", "peft", "accelerate"]
    for title, versions in (("lowest declared", lowest()), ("pinned", pinned)):
        row = re.search(rf"^\| {title}.*$", page, re.MULTILINE)
        assert row is not None
        assert [version for version in (versions[name] for name in names) if version not in row[0]] == []


def test_the_operators_need_no_numpy() -> None:
    work = """
import sys
sys.modules["numpy"] = None
import torch
from loretta_kernels import TT, TTShape, tt_linear
shape = TTShape.for_matrix(64, 96, 3)
cores = torch.randn(shape.num_params, requires_grad=True)
tt_linear(torch.randn(5, 64), TT(cores, shape)).sum().backward()
assert cores.grad.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", work], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
