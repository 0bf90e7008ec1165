"""Run a module of the tests in a new process and show what it says when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

NOT_NEEDED = dict.fromkeys(("torchao", "bitsandbytes"))  # PEFT would import them, for two seconds


def run_fresh(module: str, work: Any) -> None:
    """Hand ``work`` to ``python -m module`` as JSON on standard input."""
    code = f"import runpy, sys; sys.modules.update({NOT_NEEDED}); runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(work), text=True, capture_output=True)
    if done.returncode:
        pytest.fail(f"python -m {module} failed:\n{done.stderr[-3000:]}", pytrace=False)
