"""A fault put into PTX is found, and the message names the source line: in small kernels, and in the library's own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench.ptx import executing
from loretta_kernels import TTShape, backend
from loretta_kernels.selfcheck import random_problem
from tests.ptx import kernels
from tests.ptx.kernels import run, unwritten
from tests.ptx.mutations import MUTATIONS, Mutated

SEEDS = range(4)


def product(arch):
    """A pipelined product: cp.async, and mma or wgmma."""
    a, b = torch.randn(64, 112).bfloat16(), torch.randn(112, 64).bfloat16()
    tensors = {"a_ptr": a, "b_ptr": b, "c_ptr": unwritten(64, 64)}
    constants = {"BM": 64, "BN": 64, "BK": 16, "PRECISION": "tf32", "TRANSPOSED": False}
    return lambda **options: run(
        kernels.product, (1,), tensors, constants, stages=3, numbers={"K": 112}, arch=arch, **options
    )


def chained(arch):
    """A product of a product."""
    tensors = {name: torch.randn(64, 64).bfloat16() for name in ("a_ptr", "b_ptr", "d_ptr")}
    tensors["c_ptr"] = unwritten(64, 64)
    return lambda **options: run(
        kernels.chained, (1,), tensors, {"SIZE": 64, "PRECISION": "tf32"}, arch=arch, **options
    )


def sum_by_the_last(arch):
    """Programs that wait for one another."""

    def execute(**options):
        tensors = {"x_ptr": torch.randn(4, 256), "planes_ptr": unwritten(4, 256), "y_ptr": unwritten(256)}
        tensors["arrived_ptr"] = torch.zeros(1, dtype=torch.int32)
        constants = {"SIZE": 256, "SEM": "acq_rel", "BARRIER": True}
        return run(kernels.sum_by_the_last, (4,), tensors, constants, arch=arch, **options)

    return execute


def masked_copy(arch):
    """Loads and stores under a mask."""
    tensors = {"x_ptr": torch.randn(70), "y_ptr": unwritten(70)}
    constants = {"SIZE": 64, "LOADS": 0, "STORES": 0}
    return lambda **options: run(kernels.masked_copy, (2,), tensors, constants, numbers={"N": 70}, arch=arch, **options)


SMALL = [
    (product, "sm_80", "no barrier"),
    (product, "sm_90", "no barrier"),
    (sum_by_the_last, "sm_80", "relaxed in place of acq_rel"),
    (sum_by_the_last, "sm_90", "relaxed in place of acq_rel"),
    (masked_copy, "sm_80", "a load without its mask"),
    (masked_copy, "sm_90", "a load without its mask"),
    (masked_copy, "sm_90", "a store without its mask"),
    (product, "sm_80", "no wait for cp.async"),
    (product, "sm_80", "a wait for cp.async one group late"),
    (product, "sm_90", "a wait for cp.async one group late"),
    (product, "sm_80", "no commit of cp.async"),
    (chained, "sm_90", "no wait for wgmma"),
    (chained, "sm_90", "a wait for wgmma one group late"),
    (chained, "sm_90", "no commit of wgmma"),
    (product, "sm_90", "no wgmma.fence"),
    (chained, "sm_90", "no proxy fence"),
]


@pytest.mark.parametrize(("kernel", "arch", "mutation"), SMALL, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_in_a_small_kernel_is_found(kernel, arch, mutation):
    execute = kernel(arch)
    errors = []
    for seed in SEEDS:
        assert not execute(seed=seed).errors
        change = Mutated(mutation)
        errors += execute(seed=seed, change=change).errors
        assert change.places, "there is nothing to mutate"
    assert errors
    assert any("kernels.py:" in str(error) for error in errors), errors[0]


def step(arch, seed, change):
    """Forward and backward of an adapter; what was found."""
    shapes = TTShape.for_matrix(96, 12, 3), TTShape.for_matrix(12, 96, 3)
    problem = random_problem("tt_adapter", shapes, 70, torch.bfloat16, activation="gelu")
    with executing(arch, seed=seed, change=change) as executor, backend("triton"):
        problem.solve()
    return executor.errors


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_fault_in_the_library_s_kernels_is_found(arch, mutation):
    change = Mutated(mutation)
    errors = next(filter(None, (step(arch, seed, change) for seed in SEEDS)), [])
    if not change.places:
        pytest.skip(f"the kernels for {arch} have no place for it")
    assert errors
    assert any(".py:" in str(error) for error in errors), errors[0]
