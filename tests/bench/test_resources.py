"""bench.resources reads machine code right, and fails on a kernel that is not good enough."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench import resources
from bench.architectures import ARCHITECTURES
from bench.global_loads import load_widths
from bench.machine_code import _SASS, _counts
from bench.resources import Resources
from tests.bench.processes import run_python

pytest.importorskip("triton")
from loretta_kernels._triton.plan import shared_limit
from tests.bench.spilling import measure

GOOD = Resources(
    case="adp 4096x64x5",
    first_rate=True,
    rank=5,
    arch="sm_90",
    dtype="bf16",
    kernel="tt_adapter_fwd",
    rows=8192,
    num_warps=4,
    registers=128,
    local_bytes=0,
    local_accesses=0,
    local_in_loops=0,
    shared=40000,
    shared_limit=232448,
    tensor_core=15,
    load_bytes={"x": 16, "dy": 16, "residual": 2},
    occupancy=0.25,
)
SPILLED = {"local_bytes": 8, "local_accesses": 2}
BAD = {
    "spills": SPILLED,
    "spills-at-a-large-rank-on-hopper": SPILLED | {"rank": 16},
    "spills-at-rank-8-elsewhere": SPILLED | {"rank": 8, "arch": "sm_80"},
    "spills-in-a-loop-at-a-large-rank-elsewhere": SPILLED | {"rank": 16, "arch": "gfx942", "local_in_loops": 1},
    "takes-more-shared-memory-than-there-is": {"shared": 232449},
    "multiplies-without-tensor-cores": {"tensor_core": 0},
    "loads-x-in-narrow-pieces": {"load_bytes": {"x": 8}},
    "loads-dy-by-no-instruction-that-is-known": {"load_bytes": {"dy": 0}},
    "is-odd-and-takes-more-shared-memory-than-there-is": {"first_rate": False, "shared": 232449},
    "does-not-compile": {"error": "CompilationError"},
}


def test_a_class_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "--classes", "cls 768 5", "--jobs", "1", "--json", "--out", str(tmp_path / "kept")
    code = resources.main(command)
    said = capsys.readouterr()
    assert code == 0, said
    found = json.loads(said.out)
    kernels = ("one_pass_forward", 8192), ("one_pass_forward", 1), ("one_pass_backward", 8192)
    assert {(row["case"], row["kernel"], row["rows"]) for row in found["rows"]} == {
        ("cls 768 5", *kernel) for kernel in kernels
    }
    for row in found["rows"]:
        assert row["registers"] > 16
        assert row["tensor_core"] > 0
        assert 0 < row["occupancy"] <= 1
        assert set(row["load_bytes"].values()) == {16}
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    assert found.items() <= kept.items()
    assert {"command", "date", "torch", "triton"} <= kept.keys()
    assert "3 kernels, 0 gates failed" in (tmp_path / "kept.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_plan_knows_the_shared_memory_of_each_architecture(arch: str) -> None:
    assert shared_limit(arch) == ARCHITECTURES[arch].shared_limit


@pytest.mark.slow
def test_odd_shapes_compile_and_fit_into_little_shared_memory() -> None:
    ran = run_python("-m", "bench.resources", "--odd", "--arch", "sm_86,gfx942", "--dtype", "bf16,fp32", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_fails_on_a_kernel_that_spills(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = resources.main(["--classes", "cls 768 5", "--jobs", "1", "--json", "--arch", arch], measure)
    said = capsys.readouterr()
    assert code == 1, said
    result = json.loads(said.out)
    (row,) = result["rows"]
    assert row["local_bytes"] > 0
    assert 0 < row["local_in_loops"] <= row["local_accesses"]
    assert any("bytes of local memory" in failure for failure in result["failures"])
    assert any("no tensor-core instruction" in failure for failure in result["failures"])
    assert any("x is loaded 4 bytes at a time" in failure for failure in result["failures"])


def test_a_good_kernel_passes() -> None:
    assert GOOD.failures() == []
    assert dataclasses.replace(GOOD, rank=16, arch="sm_80", **SPILLED).failures() == []
    assert dataclasses.replace(GOOD, first_rate=False, **SPILLED).failures() == []


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_each_gate_can_fail(change: dict[str, object]) -> None:
    assert dataclasses.replace(GOOD, **change).failures()


def test_tells_a_spill_in_a_loop_from_one_outside() -> None:
    sass = """
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0020*/               @P1 BRA `(.L_x_1) ;
        /*0030*/                   LDL R2, [R1] ;
.L_x_1:
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/                   LDL R2, [R1] ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
"""
    assert _counts(sass, _SASS) == (3, 1, 1)


def test_follows_a_pointer_through_a_loop_and_not_through_what_it_loads() -> None:
    llir = """
define ptx_kernel void @kernel(ptr addrspace(1) %0, ptr addrspace(1) %1, i32 %2) local_unnamed_addr #0 !dbg !4 {
  %4 = getelementptr i8, ptr addrspace(1) %0, i64 16
  br label %5
5:
  %6 = phi ptr addrspace(1) [ %4, %3 ], [ %9, %5 ]
  %7 = tail call i32 asm sideeffect "@$2 ld.global.v4.b32 { $0 }, [ $1 + 0 ];", "=r,l,b"(ptr addrspace(1) %6, i1 true)
  %8 = zext i32 %7 to i64
  %9 = getelementptr i8, ptr addrspace(1) %6, i64 32
  %10 = getelementptr i8, ptr addrspace(1) %1, i64 %8
  %11 = load <2 x float>, ptr addrspace(1) %10, align 8
  br label %5
"""
    assert load_widths(llir, ["x_ptr", "y_ptr"]) == {"x_ptr": 16, "y_ptr": 8}


def test_occupancy_is_that_of_the_scarcest_resource() -> None:
    hopper = ARCHITECTURES["sm_90"]
    assert hopper.occupancy(registers=32, shared=0, num_warps=4) == 1
    assert hopper.occupancy(registers=255, shared=0, num_warps=4) == 8 / 64
    assert hopper.occupancy(registers=32, shared=100 * 1024, num_warps=4) == 8 / 64
