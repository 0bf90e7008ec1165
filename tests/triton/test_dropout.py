"""Dropout inside the kernels: Philox by (seed, row, column), drawn again in the backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loretta_kernels import TTShape, backend, reference, tt_adapter, tt_lora
from tests.kernels.problems import adapter_problem, assert_as_good_as_plain, lora_problem, solve

from .philox import kernel_mask, philox

pytest.importorskip("triton")

DOWN, UP = TTShape.for_matrix(150, 8, 3), TTShape.for_matrix(8, 150, 3)


def test_the_emulation_is_philox():
    # Random123's known answers for philox4x32-10: zeros, ones, the digits of pi.
    zeros = philox(np.zeros((1, 4)), (0, 0))
    assert zeros.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    ones = philox(np.full((1, 4), 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF))
    assert ones.tolist() == [[0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]]
    pi = philox(np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]), (0xA4093822, 0x299F31D0))
    assert pi.tolist() == [[0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", ["x", "another"])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_output_and_gradients_are_those_of_the_definition_under_the_emulated_mask(p, residual, dtype):
    problem = adapter_problem(DOWN, UP, (70,), dtype, residual=residual, activation="gelu")
    mask = kernel_mask(70, 150, p, seed=11)
    with backend("triton"):
        ours = solve(lambda **arguments: tt_adapter(dropout_p=p, seed=11, **arguments), problem)
    plain = solve(lambda **arguments: reference.tt_adapter(mask=mask, **arguments), problem)
    exact = solve(lambda **arguments: reference.tt_adapter(mask=mask, **arguments), problem.to(torch.float64))
    assert_as_good_as_plain(ours, plain, exact)


@pytest.mark.parametrize("seed", [0, -4, 2**63 - 1, 123456789012])
def test_every_bit_of_the_seed_counts(seed):
    problem = lora_problem(DOWN, UP, (9,), torch.float32)
    mask = kernel_mask(9, 150, 0.4, seed)
    with backend("triton"):
        ours = solve(lambda **arguments: tt_lora(dropout_p=0.4, seed=seed, **arguments), problem)
    exact = solve(lambda **arguments: reference.tt_lora(mask=mask, **arguments), problem.to(torch.float64))
    plain = solve(lambda **arguments: reference.tt_lora(mask=mask, **arguments), problem)
    assert_as_good_as_plain(ours, plain, exact)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_the_asked_share_and_rows_columns_and_seeds_are_independent(p):
    masks = torch.stack([kernel_mask(512, 512, p, seed) > 0 for seed in (1, 2)])
    deviation = (p * (1 - p) / masks.numel()) ** 0.5
    assert abs(1 - p - masks.double().mean().item()) < 4 * deviation
    centred = (masks.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2), centred.roll(4, 2)):
        assert abs((centred * shifted).mean().item()) < 4 * masks.numel() ** -0.5
