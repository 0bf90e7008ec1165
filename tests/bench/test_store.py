"""What the benchmark of a store measures is there, and a gate that is missed fails it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import store
from tests.store.adapters import save_adapter


def test_a_missed_gate_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    adapter = str(save_adapter(tmp_path / "adapter"))
    monkeypatch.setattr(store, "PROCESSES", 1)
    for limit, missed in ((1e9, []), (0.0, ["open_ms", "cold_ms", "bytes_over_numbers"])):
        monkeypatch.setattr(store, "GATES", dict.fromkeys(store.GATES, limit))
        assert store.main(["--adapter", adapter, "--adapters", "60", "--json"]) == bool(missed)
        found = json.loads(capsys.readouterr().out)
        assert found["missed"] == missed
        assert (found["adapters"], found["numbers_each"], found["dtype"]) == (60, 1800, "float32")
        assert 1 < found["bytes_over_numbers"] < 1.2
        assert found["cold_ms_worst"] >= found["cold_ms"] > 0
