"""The golden vectors through the kernels."""

from __future__ import annotations

import pytest
import torch

import loretta_kernels
from loretta_kernels import backend
from tests.kernels.golden import ON_BOND, errors

pytest.importorskip("triton")

FP32_BAR = 1e-5  # that of the PyTorch path: the longest sums here, of 4096 products, lose some sqrt(4096) roundings


@pytest.mark.parametrize("path", ON_BOND, ids=lambda path: path.stem)
def test_reproduces_outputs_and_every_gradient(path):
    with backend("triton"):
        for name, error in errors(loretta_kernels, path, torch.float32).items():
            assert error <= FP32_BAR, name
