"""The golden vectors through the kernels."""

from __future__ import annotations

import pytest
import torch

import loretta_kernels
from loretta_kernels import backend
from tests.kernels.golden import ON_BOND, errors

pytest.importorskip("triton")

FP32_BAR = 1e-5  # that of the PyTorch path: the longest sums here, of 4096 products, lose some sqrt(4096) roundings


SLOW = ("adp_768_b64_r5_gelu_new", "rep_768to768_r8_tt5", "tt_64to768_r5", "tt_cls768_r5")
PATHS = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in ON_BOND]


@pytest.mark.parametrize("path", PATHS)
def test_reproduces_outputs_and_every_gradient(path):
    with backend("triton"):
        for name, error in errors(loretta_kernels, path, torch.float32).items():
            assert error <= FP32_BAR, name
