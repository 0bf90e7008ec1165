"""bench.learning appends a row a run, repeats none, and prints what the rows say."""

from __future__ import annotations

import pytest

from bench import learning


def test_runs_are_appended_once_and_reported(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    monkeypatch.setattr(learning, "ROWS", tmp_path / "runs.jsonl")
    command = ["learning", "width", "--widths", "32", "--rates", "0.001", "0.03"]
    monkeypatch.setattr("sys.argv", command)
    learning.main()
    rows = learning.read()
    assert len(rows) == 12
    assert all(0 < row["score"] < 1.5 for row in rows)
    learning.main()
    assert learning.read() == rows

    capsys.readouterr()
    learning.report()
    assert f"| LoRA r=8 | 32 | 512 |  |  | {rows[0]['score']:.3f} |" in capsys.readouterr().out
    assert (tmp_path / "rate.png").stat().st_size > 10_000


def test_another_experiment_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["learning", "imagenet"])
    with pytest.raises(SystemExit):
        learning.main()
