"""Run a module of the tests in a new process and show what it says when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def run_fresh(module: str, work: Any) -> None:
    """Hand ``work`` to ``python -m module`` as JSON on standard input."""
    done = subprocess.run([sys.executable, "-m", module], input=json.dumps(work), text=True, capture_output=True)
    if done.returncode:
        pytest.fail(f"python -m {module} failed:\n{done.stderr[-3000:]}", pytrace=False)
