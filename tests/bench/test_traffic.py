"""bench.traffic counts what DRAM moves, and fails on a kernel that moves too much."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from bench import traffic
from bench.classes import FIRST_RATE
from loretta_kernels._triton.launch import Launch, Variant

FEATURES, BLOCK, PROGRAMS = 64, 16, 8
TENSOR = PROGRAMS * BLOCK * FEATURES * 4
IN_FLIGHT = 2 * TENSOR  # x and y of all programs, as they run side by side


@triton.jit
def _reading(x_ptr, y_ptr, sums_ptr, READS: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr):
    """y = x + sum(x), where every pass over x is one loop over the rows of a program."""
    c = tl.arange(0, FEATURES)
    first = tl.program_id(0) * BLOCK
    sums = tl.full([FEATURES], 0, tl.float32)
    for _ in range(READS - 1):
        for row in range(BLOCK):
            sums += tl.load(x_ptr + (first + row) * FEATURES + c)
    for row in range(BLOCK):
        tl.store(y_ptr + (first + row) * FEATURES + c, tl.load(x_ptr + (first + row) * FEATURES + c) + tl.sum(sums))
    tl.atomic_add(sums_ptr + c, sums)


def reading(reads: int, l2: int) -> traffic.Waves:
    """The kernel, executed with so many bytes of L2."""
    x = torch.randn(PROGRAMS * BLOCK, FEATURES)
    y, sums = torch.empty_like(x), torch.zeros(FEATURES)
    executor = traffic.Waves(bytes_of_l2=l2)
    args = {"x_ptr": x, "y_ptr": y, "sums_ptr": sums}
    variant = Variant(_reading, {"READS": reads, "BLOCK": BLOCK, "FEATURES": FEATURES}, 1, 1)
    executor(Launch(variant, (PROGRAMS,), args))
    torch.testing.assert_close(sums, x.sum(0) * (reads - 1), rtol=1e-4, atol=1e-4)
    return executor


@pytest.mark.parametrize(
    ("reads", "l2", "times"),
    [(1, 2**20, 1), (3, 2**20, 1), (3, 2 * TENSOR + 4096, 1), (3, TENSOR // 2, 3)],
    ids=["once", "from-L2", "from-an-L2-that-just-suffices", "too-much-in-between"],
)
def test_a_second_reading_is_free_where_little_was_touched_in_between(reads, l2, times):
    moved = traffic.of_launches("", "forward", True, reading(reads, l2).launches, PROGRAMS * BLOCK, 2 * TENSOR)
    assert moved.by_tensor["x_ptr"] == {"read": times * TENSOR, "written": 0}
    assert moved.by_tensor["y_ptr"] == {"read": 0, "written": TENSOR}
    assert moved.by_tensor["sums_ptr"]["written"] >= FEATURES * 4
    assert moved.issued == (reads + 1) * TENSOR + PROGRAMS * FEATURES * 4
    assert bool(moved.failures()) == (times > 1)


def test_all_programs_of_a_wave_take_from_l2_what_the_others_leave():
    """One program's rows would fit four times; those of all do not."""
    x = reading(2, TENSOR // 2).launches[0].traffic["x_ptr"]
    assert x["dram_read"] * traffic.SECTOR == 2 * TENSOR


def test_fails_on_a_second_launch():
    launches = [*reading(1, 2**20).launches, *reading(1, 2**20).launches]
    assert traffic.of_launches("", "forward", True, launches, 1, 4 * TENSOR + 4096).failures() == ["2 launches"]


def test_counts_a_class_forward_and_backward(capsys):
    torch.use_deterministic_algorithms(False)  # which takes a launch more
    code = traffic.main(["--classes", "cls 768 5", "--rows", "200", "--json"])
    forward, backward = json.loads(capsys.readouterr().out)["rows"]
    size = 200 * 768 * 2
    assert code == 0
    assert forward["launches"] == backward["launches"] == 1
    assert forward["by_tensor"]["x_ptr"] == {"read": size, "written": 0}
    assert forward["by_tensor"]["y_ptr"] == {"read": 0, "written": size}
    assert backward["by_tensor"]["dx_ptr"] == {"read": 0, "written": size}
    assert backward["by_tensor"]["x_ptr"] == backward["by_tensor"]["dy_ptr"] == {"read": size, "written": 0}


def test_gates_the_adapters_of_small_rank():
    gated = [case.name for case in FIRST_RATE if case.operator == "tt_adapter" and case.rank <= traffic.GATED_RANK]
    assert "adp 4096x64x5" in gated
    assert "adp 4096x64x16" not in gated
