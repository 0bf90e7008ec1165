"""A base loaded in 4 or 8 bits: the main job from the command line, and what reads its result."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes")

SHORT = ["--seq-len", 32, "--batch-size", 4, "--steps", 8, "--threads", 1, "--eval-limit", 8, "--json"]


@pytest.mark.parametrize(("method", "quant"), [("adp", "4bit"), ("rep", "4bit"), ("rep", "8bit")])
def test_learns_and_an_evaluation_finds_the_same(loretta, llama, book, tmp_path, method, quant) -> None:
    out = tmp_path / "out"
    command = ["--model", llama, "--data", book, "--method", method, "--lr", 0.01, *SHORT]
    ran = loretta("finetune", *command, f"--load-in-{quant}", "--output", out)
    assert ran.code == 0, ran.err
    result = ran.result()
    assert result["quant"] == quant
    assert result["after"]["perplexity"] < 0.9 * result["before"]["perplexity"]
    assert all(tensor.dtype is torch.float32 for tensor in load_file(out / "adapter_model.safetensors").values())
    assert result["base_parameters"] == AutoModelForCausalLM.from_pretrained(llama).num_parameters()

    held_out = tmp_path / "held-out.txt"
    text = book.read_text()
    held_out.write_text(text[text.index(" ", int(len(text) * 0.95)) :])
    evaluation = ["--data", held_out, "--eval-limit", 8, "--json"]
    again = loretta("eval", "--adapter", out, *evaluation)
    assert again.result()["loss"] == result["after"]["loss"], again.err
    unquantised = loretta("eval", "--adapter", out, "--model", llama, *evaluation).result()["loss"]
    assert unquantised != result["after"]["loss"]
    if method == "adp":
        return

    ran = loretta("merge", "--adapter", out, "--output", tmp_path / "whole")
    assert f"the adapter was trained on a {quant} base" in ran.err
    loss = loretta("eval", "--model", tmp_path / "whole", *evaluation).result()["loss"]
    assert math.isclose(loss, unquantised, rel_tol=1e-5)
    assert loretta("merge", "--adapter", out, f"--load-in-{quant}", "--output", tmp_path / "small").code == 0
    assert "quantization_config" in json.loads((tmp_path / "small" / "config.json").read_text())
    loss = loretta("eval", "--model", tmp_path / "small", *evaluation).result()["loss"]
    assert math.isclose(loss, result["after"]["loss"], rel_tol=0.1)

    command[1] = tmp_path / "small"
    ran = loretta("finetune", *command, f"--load-in-{quant}", "--output", tmp_path / "again")
    assert ran.code == 2
    assert f"is quantised already; leave out --load-in-{quant}" in ran.err
    ran = loretta("finetune", *command, "--output", tmp_path / "again")
    assert ran.code == 0, ran.err


def test_a_classifiers_head_is_left_whole(loretta, roberta, reviews, tmp_path: Path) -> None:
    command = ["--model", roberta, "--task", "seq_cls", "--data", reviews, "--method", "rep", "--eval-fraction", 0.2]
    ran = loretta("finetune", *command, "--load-in-4bit", "--epochs", 3, "--json", "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert ran.result()["after"]["accuracy"] > 0.9


def test_refuses_what_cannot_be_quantised(loretta, llama, book, tmp_path, monkeypatch) -> None:
    (tmp_path / "model.gguf").write_text("")
    command = ["--data", book, "--method", "rep", "--load-in-8bit", "--output", tmp_path / "out"]
    ran = loretta("finetune", "--model", tmp_path / "model.gguf", *command)
    assert ran.code == 2
    assert "--load-in-8bit does not go with a GGUF model" in ran.err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    ran = loretta("finetune", "--model", llama, *command)
    assert ran.code == 2
    assert "--load-in-8bit needs the package bitsandbytes: pip install 'loretta-tt[quant]'" in ran.err
