"""A smoke test in Triton's interpreter, which users may turn on to debug."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import torch
from loretta_kernels import TTShape, backend
from loretta_kernels.selfcheck import check, random_problem

shapes = TTShape((3, 4), (2, 2), 2), TTShape((2, 2), (4, 3), 2)
with backend("triton"):
    check(random_problem("tt_adapter", shapes, 5, torch.float32, activation="gelu"), "triton")
"""


@pytest.mark.parametrize("executor", ["sm_90"], indirect=True)
def test_a_small_adapter_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LORETTA_PTX", None)
    subprocess.run([sys.executable, "-c", CODE], check=True, env=environment)
