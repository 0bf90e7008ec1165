"""Python in a process of its own, which compiles kernels unless it chooses to interpret them."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter in the repository's root without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
