"""The page on several GPUs: its commands are ones that the command line knows, and the one for CPUs runs as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from loretta.cli.parser import make_parser

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^(?:torchrun|accelerate).*$", (ROOT / "docs" / "several-gpus.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_knows_every_command(command) -> None:
    words = shlex.split(command)
    make_parser().parse_args(words[words.index("loretta") + 1 :])
    configs = [word for word in words if word.startswith("configs/")]
    assert all((ROOT / config).is_file() for config in configs)


@pytest.mark.slow
def test_the_command_for_cpus_runs_as_written(llama, book, tmp_path) -> None:
    (tmp_path / "llama").symlink_to(llama)
    (tmp_path / "book.txt").symlink_to(book)
    (command,) = [command for command in COMMANDS if command.startswith("torchrun --nproc-per-node 2")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(shlex.split(command), cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("perplexity after") == 1
    assert (tmp_path / "runs" / "book" / "adapter_model.safetensors").is_file()
