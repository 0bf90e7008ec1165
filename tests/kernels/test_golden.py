"""The golden vectors through the definition and through the operators."""

from __future__ import annotations

import pytest
import torch

import loretta_kernels
from loretta_kernels import reference

from .golden import FILES, ON_BOND, errors

# Their cut falls inside a core, or no prefix of the modes divides: these need the conversion that comes later.
OFF_BOND = {
    "adp_1024_b8_r4_tanh",
    "adp_4096_b64_r5_relu",
    "layer_adp_mh_adapter_relu_bias",
    "layer_adp_output_adapter_gelu_bias",
    "layer_rep_bias",
    "rep_4096to4096_r8_tt5",
    "rep_8192to1024_r8_tt5",
    "tt_1280to64_r5_unaligned",
    "tt_64to4096_r5_straddle",
    "tt_64to5120_r5_unaligned",
    "tt_tiny4to6_24_order1",
    "tt_tiny6to4_4x6_r3_straddle",
}


def test_the_files_off_a_bond_are_those_listed():
    assert len(FILES) == 21
    assert {path.stem for path in FILES} - {path.stem for path in ON_BOND} == OFF_BOND


@pytest.mark.parametrize("path", ON_BOND, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("functions", "dtype", "bar"),
    [
        pytest.param(reference, torch.float64, 1e-12, id="reference-fp64"),
        pytest.param(loretta_kernels, torch.float64, 1e-12, id="operators-fp64"),
        pytest.param(loretta_kernels, torch.float32, 1e-5, id="operators-fp32"),
    ],
)
def test_reproduces_outputs_and_every_gradient(path, functions, dtype, bar):
    for name, error in errors(functions, path, dtype).items():
        assert error <= bar, name
