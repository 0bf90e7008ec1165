"""The report says what the results say: ratios, bars, who is missing, and no ratio for who is wrong."""

from __future__ import annotations

import json

import pytest

from bench import report
from bench.bars import bars

FACTS = {"saved_bytes": 2**20, "peak_bytes": 2**22, "error": 1e-6}


def timed(both: float, **facts) -> dict:
    return {"forward": both / 4, "backward": 0.75 * both, "both": both, "spread": 0.01, "rounds": 9} | facts


def operator(N: int, **peers) -> dict:
    found = {"loretta": timed(2.0, **FACTS), "copy": timed(1.0), "base linear": timed(50.0)} | peers
    size = {"kind": "adp", "d": 4096, "width": 64, "rank": 5, "N": N, "dtype": "float32", "drift": 0.004}
    return size | {"peers": found, "red": {}, "unavailable": {}}


def run(benchmark: str, *records: dict) -> dict:
    head = {"benchmark": benchmark, "grid": "quick", "device": "a processor", "threads": 1, "python": "3", "cuda": None}
    return head | {"versions": {"torch": "2.13.0"}, "records": list(records)}


@pytest.fixture
def written(tmp_path):
    def write(*runs: dict) -> str:
        (tmp_path / "cpu").mkdir(exist_ok=True)
        for made in runs:
            (tmp_path / "cpu" / f"{made['benchmark']}.json").write_text(json.dumps(made))
        assert report.main(["--results", str(tmp_path)]) == 0
        return (tmp_path / "REPORT.md").read_text()

    return write


def test_ratios_limits_and_a_plot(written, tmp_path):
    dense = timed(5.0, **FACTS)
    text = written(run("tt_adapter", operator(16, dense=dense), operator(512, dense=dense)))
    header, _, row = next(block for block in text.split("\n\n") if block.startswith("| d | rank")).splitlines()[:3]
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["dense / ours"] == "2.50"
    assert cells["times a copy"] == "2.00"
    assert cells["of the base linear"] == "4.0%"
    assert "differs by 0.4% in the median" in text
    assert (tmp_path / "cpu" / "tt_adapter.png").stat().st_size > 10_000


def test_who_is_wrong_has_no_ratio_and_who_is_missing_a_reason(written):
    wrong = operator(16, dense=timed(5.0, **FACTS)) | {"unavailable": {"upstream": "not installed: make peers"}}
    red = operator(512) | {"red": {"dense": 0.3}}
    text = written(run("tt_adapter", wrong, red))
    assert "| wrong |" in text
    assert "dense: off by 3.0e-01 from the definition, not timed" in text
    assert "upstream: not installed: make peers" in text


def test_bars_hold_or_miss():
    upstream = timed(7.0, saved_bytes=2**21, peak_bytes=0)
    rows = bars([run("tt_adapter", operator(512, upstream=upstream, dense=timed(2.2, **FACTS)))])
    verdicts = {what.partition(": ")[2]: (measured, verdict) for what, _, measured, verdict in rows}
    assert verdicts["upstream / ours"] == ("3.5", "**misses**")
    assert verdicts["bytes kept, ours / upstream"] == ("0.5 (x alone: 4)", "holds")
    assert verdicts["dense bottleneck / ours"] == ("1.1", "holds")


def test_the_share_of_a_step_is_over_the_frozen_base(written):
    def method(step: float) -> dict:
        share = {"share": step / 100 - 1, "share_low": step / 100 - 1.01, "share_high": step / 100 - 0.99}
        share["whole_share"] = share["share"]
        rest = {"step": step, "optimiser": 0.0, "tokens_per_second": 1, "peak_bytes": 1, "trainable": 1}
        return timed(step) | rest | share

    methods = {"frozen base": method(100), "loretta adp": method(104), "upstream adp": method(120)}
    step = {"model": "llama", "tokens": 8, "dtype": "float32", "drift": 0.0, "methods": methods}
    made = run("training_step", step | {"red": {}, "unavailable": {}})
    (row,) = bars([made])
    assert row[1:] == ("at most 0.5", "0.2 (4.0% / 20.0%)", "holds")
    assert "| loretta adp | 1 |" in written(made)
    methods["upstream adp"]["share_low"] = 0.02
    ((*_, verdict),) = bars([made])
    assert verdict.startswith("not resolved")


def test_nothing_to_report_says_what_to_run(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "make bench" in capsys.readouterr().err


def test_what_an_instrument_wrote_beside_the_runs_is_left_alone(written, tmp_path):
    for folder in ("cpu", "compile"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "sweep.json").write_text(json.dumps({"command": "python -m bench.resources"}))
    assert "sweep" not in written(run("tt_adapter", operator(16)))


def test_rows_of_different_adapters(written):
    size = {"mode": "serving", "kind": "rep", "d": 576, "rows": 512, "drift": -0.01}
    peers = {"loretta": timed(2.0), "loop": timed(9.0)}
    records = [
        size | {"adapters": 1, "peers": peers},
        size | {"adapters": 64, "peers": peers | {"stacked": timed(1.0)}},
    ]
    header, _, one, many = written(run("grouped", *records)).split("\n\n")[-1].splitlines()
    cells = [dict(zip(header.split(" | "), row.split(" | "), strict=True)) for row in (one, many)]
    assert [row["loop / ours"] for row in cells] == ["4.50", "4.50"]
    assert [row["stacked / ours"] for row in cells] == ["-", "0.50"]
    assert cells[1]["adapters"] == "64"
