"""The page on serving many adapters runs as written, with its server on a port that is free."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from loretta import LorettaRepConfig
from tests.serving.test_docs import DOCS, blocks, run_blocks, save_adapter, save_base

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
PAGE = "serving-many.md"


def test_serving_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    config = LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False)
    for name in ("anna", "ben"):
        save_adapter(tmp_path / "base", config, tmp_path / "runs" / name)
    *before, (language, asking) = blocks(PAGE)
    names = run_blocks(PAGE, before, {})
    for row, name in enumerate(["ben", "anna"]):
        alone = AutoPeftModelForCausalLM.from_pretrained(f"runs/{name}").eval()
        torch.testing.assert_close(names["logits"][row], alone(input_ids=names["ids"][:1]).logits[0].detach())

    (command,) = re.findall(r"^loretta (serve .*)$", (DOCS / PAGE).read_text(), re.MULTILINE)
    words = command.replace("8000", "0").split()
    with subprocess.Popen([sys.executable, "-m", "loretta", *words], stderr=subprocess.PIPE, text=True) as server:
        try:
            port = next(found[1] for line in server.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
            run_blocks(PAGE, [(language, asking.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))], names)
        finally:
            server.terminate()
    assert names["names"] == ["base", "anna", "ben"]
    assert (names["answer"]["model"], names["answer"]["usage"]["prompt_tokens"]) == ("ben", 2)
