"""`loretta serve`: it says where it listens and answers there; what it cannot serve is one line."""

import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from loretta import LorettaRepConfig, get_peft_model
from tests.cli.conftest import write_llama
from tests.cli.test_main import expect_one_line

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture
def shop(tmp_path, llama, loretta, monkeypatch) -> Path:
    """A store with one adapter of the tiny Llama on disk."""
    monkeypatch.chdir(tmp_path)
    config = LorettaRepConfig(task_type="CAUSAL_LM", init_weights=False, train_layernorm=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained("anna")
    assert loretta("store", "add", "shop", "anna").code == 0
    return Path("shop")


def test_serves_until_it_is_interrupted(shop, llama) -> None:
    command = [sys.executable, "-m", "loretta", "serve", "--store", "shop", "--port", "0"]
    # A test run in the background ignores interrupts, which a new process would inherit.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as server:
        said = [server.stderr.readline() for _ in range(2)]
        found = re.fullmatch(r"serving llama and 1 adapters at (http://127\.0\.0\.1:\d+/v1)\n", said[1])
        assert found, said
        names = [model["id"] for model in httpx.get(f"{found[1]}/models", timeout=30).json()["data"]]
        answers = [
            httpx.post(f"{found[1]}/completions", timeout=30, json={"model": name, "prompt": "ab", "temperature": 0})
            for name in names
        ]
        server.send_signal(signal.SIGINT)
        assert server.stderr.read() == "\nloretta serve: interrupted\n"
    assert server.returncode == 130
    assert names == ["llama", "anna"]
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 2


def test_refuses_in_one_line(loretta, shop) -> None:
    expect_one_line(loretta("serve", "--store", "none"), " serve", "none: no adapter store there")
    expect_one_line(loretta("serve", "--store", shop, "--model", "./none"), " serve", "./none: no such model folder")
    expect_one_line(loretta("serve", "--store", shop, "--port", "70000"), " serve", "a whole number from 0 to 65535")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expect_one_line(loretta("serve", "--store", shop, "--port", port), " serve", f"--port {port}: ")


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named(loretta, shop, package, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    expect_one_line(loretta("serve", "--store", shop), " serve", f"needs the package {package}: pip install")


def test_a_store_of_another_model_is_refused(loretta, shop, tmp_path, tokenizer) -> None:
    write_llama(tmp_path / "deeper", tokenizer, layers=3)
    ran = loretta("serve", "--store", shop, "--model", "deeper", "--port", "0")
    assert ran.code == 2
    assert "error: shop: the store's adapters do not fit this model: " in ran.err.splitlines()[-1]
