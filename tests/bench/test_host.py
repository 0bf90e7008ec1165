"""bench.host times our layers and PEFT's without a GPU, and fails where a call takes too long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")


from bench import host


def test_times_every_layer_and_fails_above_the_bars():
    # In a process of its own: the driver that launches nothing stays.
    program = "import sys; sys.modules.update(dict.fromkeys(('torchao', 'bitsandbytes')))\n"  # 2 seconds to import
    program += "from bench import host; host.BARS = dict.fromkeys(host.BARS, 0)\n"
    program += "sys.exit(host.main(['--seconds', '0', '--json']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert {"tt_adapter", "tt_lora", "tt_linear", "PEFT's LoRA"} < found["microseconds"].keys()
    assert all(0 < times["forward"] < times["both"] for times in found["microseconds"].values())
    assert len(found["above"]) == 6


def test_passes_within_the_bars(monkeypatch, capsys):
    times = {"tt_linear": {"forward": 40.0, "both": 150.0}, "PEFT's LoRA": {"forward": 41.0, "both": 151.0}}
    monkeypatch.setattr(host, "measured", lambda seconds: times)
    assert host.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["above"] == []
