"""bench.predict makes times of what the other instruments counted."""

from __future__ import annotations

import json

import pytest
import torch

from bench import predict
from bench.classes import FIRST_RATE
from loretta_kernels._triton.plan import plan_of

pytest.importorskip("triton")
CASE = next(case for case in FIRST_RATE if case.name == "adp 4096x64x8")  # whose backward is streamed


@pytest.fixture(autouse=True)
def _sums_by_atomics() -> None:
    torch.use_deterministic_algorithms(False)  # which take a launch more


def phase(name, programs, cycles, kernel="_one_pass_forward_kernel", rows=70):
    fields = {"case": CASE.name, "rows": rows, "launch": kernel, "phase": name, "programs": programs}
    return fields | {"cycles": 2 * cycles, "reordered": cycles}


def counters(rows):
    forward, backward = "_one_pass_forward_kernel", "_backward_kernel"
    programs, blocks = (1, 1) if rows == 1 else (2, 4.5)  # nine blocks of eight rows
    return [
        phase("store_products:9", programs, 1000, forward, rows),
        phase("for block:20", programs, blocks * 10_000, forward, rows),
        phase("for block:20 / for c0:30", programs, blocks * 20_000, forward, rows),
        phase("from 9", 2, 1000, backward, rows),
        phase("for block:20", 2, 1_000_000, backward, rows),
        phase("is_last:70", 1, 5000, backward, rows),
        {"case": CASE.name, "rows": rows, "launch": backward, "grid": [2, 1], "traffic": {}},
    ]


def write(folder, resident=1):
    compiled = [
        {"case": CASE.name, "kernel": kernel, "rows": rows, "occupancy": resident / 8, "num_warps": 8}
        for kernel in ("one_pass_forward", "backward")
        for rows in (8192, 1)
    ]
    moved = [{"case": CASE.name, "direction": direction, "ratio": 1.5} for direction in ("forward", "backward")]
    for name, content in (
        ("ptx", {"counters": counters(1) + counters(70)}),
        ("compile", {"rows": compiled}),
        ("traffic", {"rows": moved}),
    ):
        (folder / name).mkdir()
        (folder / name / "bf16-sm_90.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("rows", "blocks"), [(8, 1), (528, 1), (2048, 2), (8192, 8)])
def test_a_program_takes_its_start_once_and_the_loop_for_every_block(rows, blocks, tmp_path):
    write(tmp_path)
    forward, _ = predict.predict(CASE, *predict.read(tmp_path), rows=[rows])
    assert forward.low == pytest.approx((1000 + blocks * 30_000) / predict.GHZ / 1e3)
    assert forward.high == pytest.approx(2 * forward.low)


def test_memory_counts_where_it_takes_longer_and_what_one_program_does_alone_comes_on_top(tmp_path):
    write(tmp_path)
    counted, resident, ratios = predict.read(tmp_path)
    for key in counted:
        counted[key] = [each for each in counted[key] if not each["phase"].startswith("for")]
    backward = predict.predict(CASE, counted, resident, ratios, rows=[8192])[1]
    assert backward.floor == pytest.approx(3 * 8192 * 4096 * 2 / predict.TB_PER_S / 1e6)
    assert backward.low == pytest.approx(1.5 * backward.floor + 5000 / predict.GHZ / 1e3)


def test_programs_that_do_not_fit_at_once_run_in_rounds(tmp_path):
    blocks = plan_of(*CASE.shapes, 2, "sm_90").backward_of(16384)
    for resident, rounds in ((1, -(-16384 // blocks.n // 132)), (2, 1)):
        folder = tmp_path / str(resident)
        folder.mkdir()
        write(folder, resident)
        backward = predict.predict(CASE, *predict.read(folder), rows=[16384])[1]
        assert backward.low == pytest.approx((rounds * 1_001_000 + 5000) / predict.GHZ / 1e3)


def test_it_says_what_is_missing(tmp_path, capsys):
    assert predict.main(["--results", str(tmp_path)]) == 2
    assert "bf16-sm_90.json is missing" in capsys.readouterr().err
