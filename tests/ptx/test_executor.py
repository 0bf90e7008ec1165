"""The executor computes what a GPU would, and finds what is wrong with a kernel."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from tests.ptx import kernels
from tests.ptx.kernels import ARCHITECTURES, run, unwritten

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
SEEDS = range(3)


def whats(executor):
    """What was found, without saying where."""
    return {finding.what for finding in executor.findings}


@every_architecture
@pytest.mark.parametrize("barrier", [True, False], ids=["barrier", "no-barrier"])
def test_a_barrier_orders_what_threads_store_and_load(arch, barrier):
    x, y = torch.randn(512), unwritten(512)
    tensors = {"x_ptr": x, "scratch_ptr": unwritten(512), "y_ptr": y}
    executor = run(kernels.reversed_through_scratch, (1,), tensors, {"SIZE": 512, "BARRIER": barrier}, arch=arch)
    if barrier:
        assert not executor.findings
        assert torch.equal(y, x.flip(0))
    else:
        assert "race between warps" in whats(executor)
        assert any("kernels.py" in finding.loc and "kernels.py" in finding.other for finding in executor.errors)


@pytest.mark.parametrize("warps", [1, 4])
def test_lanes_of_a_warp_need_a_barrier_too(warps):
    tensors = {"x_ptr": torch.randn(64), "scratch_ptr": unwritten(64), "y_ptr": unwritten(64)}
    executor = run(kernels.reversed_through_scratch, (1,), tensors, {"SIZE": 64, "BARRIER": False}, warps=warps)
    assert "race between lanes of a warp" in whats(executor) or warps == 4
    assert executor.errors


@every_architecture
@pytest.mark.parametrize(
    ("sem", "barrier", "right"),
    [("acq_rel", True, True), ("relaxed", True, False), ("acquire", True, False), ("release", True, False)],
)
def test_the_last_program_sees_all_others_by_release_and_acquire_only(arch, sem, barrier, right):
    x = torch.randn(5, 256)
    wrong = 0
    for seed in range(8):
        y, arrived = unwritten(256), torch.zeros(1, dtype=torch.int32)
        tensors = {"x_ptr": x, "planes_ptr": unwritten(5, 256), "arrived_ptr": arrived, "y_ptr": y}
        constants = {"SIZE": 256, "SEM": sem, "BARRIER": barrier}
        executor = run(kernels.sum_by_the_last, (5,), tensors, constants, arch=arch, seed=seed)
        assert right or "race between programs" in whats(executor), seed
        if right:
            assert not executor.errors
            assert arrived.item() == 0
            torch.testing.assert_close(y, x.sum(0))
        wrong += not torch.allclose(y, x.sum(0))
    assert wrong or sem not in ("relaxed", "acquire"), "memory was kinder than a GPU's may be"


def test_a_program_releases_what_its_warps_stored_before_a_barrier_only():
    x = torch.randn(5, 256)
    constants = {"SIZE": 256, "SEM": "acq_rel", "BARRIER": False}
    found = set()
    for seed in SEEDS:
        arrived = torch.zeros(1, dtype=torch.int32)
        tensors = {"x_ptr": x, "planes_ptr": unwritten(5, 256), "arrived_ptr": arrived, "y_ptr": unwritten(256)}
        executor = run(
            kernels.sum_by_the_last,
            (5,),
            tensors,
            constants,
            seed=seed,
            change=lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx, count=1),
        )
        found |= whats(executor)
    assert "race between programs" in found


@every_architecture
def test_finds_loads_and_stores_out_of_bounds(arch):
    for loads, stores, where in ((0, 0, None), (1, 0, "x_ptr"), (0, 1, "y_ptr")):
        x, y = torch.randn(70), unwritten(70)
        constants = {"SIZE": 64, "LOADS": loads, "STORES": stores}
        executor = run(kernels.masked_copy, (2,), {"x_ptr": x, "y_ptr": y}, constants, numbers={"N": 70}, arch=arch)
        if where is None:
            assert not executor.findings
            assert torch.equal(x, y)
        else:
            (finding,) = executor.errors
            assert finding.what == "out of bounds"
            assert "kernels.py" in finding.loc


def test_finds_a_read_of_what_nobody_wrote():
    tensors = {"x_ptr": unwritten(64), "y_ptr": unwritten(64)}
    executor = run(kernels.masked_copy, (1,), tensors, {"SIZE": 64, "LOADS": 0, "STORES": 0}, numbers={"N": 64})
    assert whats(executor) == {"read of what nobody wrote"}


@every_architecture
def test_programs_may_add_by_atomics_and_by_nothing_else(arch):
    x = torch.randn(6, 128)
    for atomic in (True, False):
        sums = torch.zeros(128)
        executor = run(kernels.add_up, (6,), {"x_ptr": x, "sum_ptr": sums}, {"SIZE": 128, "ATOMIC": atomic}, arch=arch)
        if atomic:
            assert not executor.findings
            torch.testing.assert_close(sums, x.sum(0))
        else:
            assert whats(executor) == {"race between programs"}


def test_atomics_add_in_another_order_by_another_seed():
    x, answers = torch.randn(16, 128), []
    for seed in range(6):
        sums = torch.zeros(128)
        run(kernels.add_up, (16,), {"x_ptr": x, "sum_ptr": sums}, {"SIZE": 128, "ATOMIC": True}, seed=seed)
        answers.append(sums)
    assert any(not torch.equal(answers[0], other) for other in answers)


def test_finds_a_program_that_waits_for_ever(monkeypatch):
    from bench.ptx import executor

    monkeypatch.setattr(executor, "LIMIT", 20_000)
    found = run(kernels.wait_for_a_flag, (1,), {"flag_ptr": torch.zeros(1, dtype=torch.int32)})
    assert whats(found) == {"does not end"}


def test_arguments_that_overlap_are_one_memory():
    both = torch.cat([torch.randn(64), torch.zeros(64)])
    tensors = {"x_ptr": both, "y_ptr": both[64:]}
    executor = run(kernels.masked_copy, (1,), tensors, {"SIZE": 64, "LOADS": 0, "STORES": 0}, numbers={"N": 64})
    assert not executor.findings
    assert torch.equal(both[:64], both[64:])


@every_architecture
def test_knows_every_atomic_of_triton(arch):
    x = torch.randint(0, 2**20, (128,), dtype=torch.int32)
    for half in (torch.float16, torch.bfloat16)[: 1 if arch == "sm_80" else 2]:  # sm_80 has none of bf16
        ints = torch.tensor([3, 5, 2**20, 2**20 - 1, 0, 0, 0, 11], dtype=torch.int32)
        wide, halves = torch.tensor([1], dtype=torch.int64), torch.zeros(1, dtype=half)
        tensors = {"x_ptr": x, "int_ptr": ints, "wide_ptr": wide, "half_ptr": halves}
        assert not run(kernels.atomics, (1,), tensors, {"SIZE": 128}, arch=arch).errors
        numbers = x.tolist()
        expected = [3 + sum(numbers), max(numbers), min(numbers), 2**20 - 1, 0, 0, 7, 12]
        for number in numbers:
            expected[3] &= number
            expected[4] |= number
            expected[5] ^= number
        assert ints.tolist() == expected
        assert wide.item() == 1 + (sum(numbers) << 33)
        assert halves.item() == sum(number % 3 for number in numbers)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reduces_and_scans(arch, dtype):
    x, y = torch.randn(16, 64).to(dtype), unwritten(16 * 66)
    executor = run(kernels.reductions, (1,), {"x_ptr": x, "y_ptr": y}, {"ROWS": 16, "COLUMNS": 64}, arch=arch)
    assert not executor.findings
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.1}
    torch.testing.assert_close(y[:16], x.float().sum(1), **tolerance)
    torch.testing.assert_close(y[16:32], x.float().max(1).values)
    torch.testing.assert_close(y[32:].view(16, 64), x.float().cumsum(1), **tolerance)


PRODUCTS = [
    pytest.param(torch.bfloat16, "tf32", 64, 64, 1e-5, id="bf16"),
    pytest.param(torch.float16, "tf32", 64, 32, 1e-5, id="fp16"),
    pytest.param(torch.float16, "tf32", 16, 16, 1e-5, id="fp16-of-one-small-tile"),
    pytest.param(torch.float32, "tf32", 64, 64, 3e-3, id="tf32"),
    pytest.param(torch.float32, "tf32x3", 64, 32, 1e-5, id="tf32-in-three"),
    pytest.param(torch.float32, "ieee", 32, 32, 1e-5, id="fp32"),
]


@every_architecture
@pytest.mark.parametrize("transposed", [False, True], ids=["by-rows", "by-columns"])
@pytest.mark.parametrize(("dtype", "precision", "size", "columns", "bar"), PRODUCTS)
def test_products_are_torchs(arch, dtype, precision, size, columns, bar, transposed):
    torch.manual_seed(0)
    a, b, c = torch.randn(size, 112).to(dtype), torch.randn(112, columns).to(dtype), unwritten(size, columns)
    tensors = {"a_ptr": a, "b_ptr": b.T.contiguous() if transposed else b, "c_ptr": c}
    constants = {"BM": size, "BN": columns, "BK": 32, "PRECISION": precision, "TRANSPOSED": transposed}
    for seed in SEEDS:
        executor = run(kernels.product, (1,), tensors, constants, stages=3, numbers={"K": 112}, arch=arch, seed=seed)
        assert not executor.errors
        exact = a.double() @ b.double()
        assert (c - exact).norm() <= bar * exact.norm()
    opcodes = {
        instruction.text.split(".")[0].split()[-1] for instruction in executor.launches[0].program.code.instructions
    }
    if precision != "ieee":
        assert ("wgmma" if arch == "sm_90" and size == 64 else "mma") in opcodes
        assert "cp" in opcodes


@every_architecture
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 3e-3)], ids=str
)
def test_a_product_of_a_product_is_torchs(arch, dtype, bar):
    a, b, d = (torch.randn(64, 64).to(dtype) / 8 for _ in range(3))
    c = unwritten(64, 64)
    tensors = {"a_ptr": a, "b_ptr": b, "d_ptr": d, "c_ptr": c}
    for seed in SEEDS:
        executor = run(kernels.chained, (1,), tensors, {"SIZE": 64, "PRECISION": "tf32"}, arch=arch, seed=seed)
        assert not executor.errors
        exact = torch.nn.functional.silu(a.double() @ b.double()) @ d.double()
        assert (c - exact).norm() <= bar * exact.norm()


@every_architecture
def test_tensor_cores_cut_fp32_operands_and_do_not_round_them(arch):
    a, b, c = torch.rand(64, 112) + 0.5, torch.rand(112, 64) + 0.5, unwritten(64, 64)
    tensors, exact = {"a_ptr": a, "b_ptr": b, "c_ptr": c}, a.double() @ b.double()
    constants = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": "tf32", "TRANSPOSED": False}
    run(kernels.product, (1,), tensors, constants, stages=3, numbers={"K": 112}, arch=arch)
    assert -1e-3 < ((c - exact) / exact).mean() < -5e-4  # rounded, its mean would be a hundred times nearer to 0
