"""The compiled C: made once, found again, and never in the way where it cannot be made."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loretta_kernels import TTShape, tt_linear
from loretta_kernels._c import library

from ..kernels.problems import CALL


def processes(count: int, cache: Path, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """A call in each of so many processes at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LORETTA_CACHE": str(cache)} | environment
    running = [
        subprocess.Popen([sys.executable, "-c", CALL], stdout=-1, stderr=-1, text=True, env=environment)
        for _ in range(count)
    ]
    return [subprocess.CompletedProcess(p.args, p.wait(), *p.communicate()) for p in running]


def script(path: Path, body: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_processes_that_start_together_leave_one_library(tmp_path):
    outcomes = processes(3, tmp_path / "cache", LORETTA_BACKEND="c")
    assert [(o.returncode, o.stdout, o.stderr) for o in outcomes] == [(0, "[[2.0, 2.0]]\n", "")] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_is_compiled_once(tmp_path):
    compiler = script(tmp_path / "compiler", f'echo "$@" >> {tmp_path}/calls; exec cc "$@"')
    for _ in range(2):
        assert processes(1, tmp_path / "cache", CC=compiler, LORETTA_BACKEND="c")[0].returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.startswith("-O3") for call in calls] == [False, True, False]  # its version, and once the source


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('test "$1" = --version || { echo "no such flag: -march" >&2; exit 1; }', "no such flag: -march"),
        ('test "$1" = --version || { while [ "$1" != -o ]; do shift; done; echo x > "$2"; }', "OSError"),
        ("exit 127", "RuntimeError"),
    ],
    ids=["cannot-compile", "makes-no-library", "does-not-run"],
)
def test_a_compiler_that_fails_leaves_the_work_to_pytorch_and_is_named_once(tmp_path, body, reason):
    compiler = script(tmp_path / "compiler", body)
    (outcome,) = processes(1, tmp_path / "cache", CC=compiler)
    assert outcome.stdout == "[[2.0, 2.0]]\n"
    assert reason in outcome.stderr
    assert outcome.stderr.count("PyTorch serves the tensor trains on this CPU, which is slower") == 1
    (forced,) = processes(1, tmp_path / "cache", CC=compiler, LORETTA_BACKEND="c")
    assert 'RuntimeError: backend "c" was asked for, but cannot serve: ' in forced.stderr


def test_no_compiler_leaves_the_work_to_pytorch(tmp_path):
    (outcome,) = processes(1, tmp_path / "cache", PATH=str(tmp_path), CC="")
    assert outcome.stdout == "[[2.0, 2.0]]\n"
    assert "there is no C compiler: CC is not set, and none of cc, gcc and clang is installed" in outcome.stderr


def test_a_cache_that_cannot_be_written_leaves_the_work_to_pytorch(tmp_path):
    (tmp_path / "file").touch()
    (outcome,) = processes(1, tmp_path / "file" / "cache")
    assert outcome.stdout == "[[2.0, 2.0]]\n"
    assert "NotADirectoryError" in outcome.stderr


def test_what_the_library_is_named_after(monkeypatch, tmp_path):
    name = library._key(["cc", "-O3"])
    assert name == library._key(["cc", "-O3"])
    assert name != library._key(["cc", "-O2"])
    source = tmp_path / "source"
    source.mkdir()
    for file in library.SOURCE.glob("*.[ch]"):
        (source / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(library, "SOURCE", source)
    assert name == library._key(["cc", "-O3"])
    (source / "rows.h").write_text("")
    assert name != library._key(["cc", "-O3"])


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORETTA_CACHE", raising=False)
    assert library.folder() == tmp_path / "loretta"
    monkeypatch.setenv("LORETTA_CACHE", str(tmp_path / "mine"))
    assert library.folder() == tmp_path / "mine"


def test_compiles_without_a_warning(tmp_path):
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [*library._compiler(), *library.FLAGS, *warnings, str(library.SOURCE / "adapter.c"), "-lm", "-o"]
    library._run([*command, str(tmp_path / "adapter.so")])


def test_runs_on_the_threads_of_torch_alone():
    shape = TTShape((16, 16), (4, 4), 3)
    torch.set_num_threads(2)
    tt_linear(torch.ones(900, 256), torch.ones(shape.num_params), shape)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1
