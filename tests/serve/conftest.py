"""A server of a tiny Llama with twenty adapters, in this process, on a port of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loretta import AdapterStore
from loretta.serve.adapters import StoreModel
from loretta.serve.batching import Batcher
from tests.cli.conftest import CHAT_TEMPLATE
from tests.store.adapters import save_adapter, variant
from tests.tiny_models import VOCABULARY, tiny_model

NAMES = [f"adapter-{number}" for number in range(20)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as many as the tiny models know."""
    tokens = ["<unk>", "<pad>", "</s>", *ascii_letters, *" .<>/"]
    vocabulary = {token: number for number, token in enumerate(tokens[:VOCABULARY])}
    inner = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twenty adapters by their names."""
    parent = tmp_path_factory.mktemp("adapters")
    first = save_adapter(parent / NAMES[0], train_layernorm=True)
    return {NAMES[0]: first} | {name: variant(parent / name, first, seed) for seed, name in enumerate(NAMES[1:])}


def make_base() -> Any:
    """The base model, with room for long answers."""
    return tiny_model("llama", max_position_embeddings=512)


@dataclass
class Running:
    """A server that runs, and what it is made of."""

    url: str
    client: Any
    batcher: Batcher
    store: AdapterStore
    loop: asyncio.AbstractEventLoop
    tokenizer: Any

    def post(self, path: str = "completions", **body: Any) -> Any:
        """One request; "base" and no randomness unless the body says otherwise."""
        return self.client.post(f"{self.url}/v1/{path}", json={"model": "base", "temperature": 0} | body)

    def idle(self) -> bool:
        """Whether it becomes idle within some seconds."""
        for _ in range(500):
            if self.batcher.load == (0, 0):
                return True
            time.sleep(0.01)
        return False


@pytest.fixture
def serve(tmp_path: Path, folders: dict[str, Path]) -> Iterator[Callable[..., Running]]:
    """Starts a server with all adapters; options are the batcher's."""
    import httpx
    import uvicorn

    from loretta.serve.app import make_app

    # A connection for each request, but no certificates read for each, which takes longer than most answers.
    client = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=120)
    started: list[tuple[Any, threading.Thread]] = []

    def start(**options: Any) -> Running:
        store = AdapterStore.create(tmp_path / "store", like=folders[NAMES[0]])
        store.add(folders)
        tokenizer = make_tokenizer()
        batcher = Batcher(StoreModel(make_base(), store, options.get("max_batch", 16)), tokenizer, **options)
        server = uvicorn.Server(uvicorn.Config(make_app(batcher, "base"), log_level="warning"))
        loop, listening = asyncio.new_event_loop(), socket.socket()
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listening])))
        thread.start()
        started.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return Running(f"http://127.0.0.1:{listening.getsockname()[1]}", client, batcher, store, loop, tokenizer)

    yield start
    client.close()
    for server, thread in started:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def alone(folders: dict[str, Path]) -> Callable[[str, str, int], str]:
    """What `generate` answers on the base with one adapter, loaded by PEFT, without any batch."""
    tokenizer = make_tokenizer()
    model = PeftModel.from_pretrained(make_base(), folders[NAMES[0]], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    model.eval()

    @torch.no_grad()
    def answer(name: str, prompt: str, max_tokens: int) -> str:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_tokens, "do_sample": False}
        if name == "base":
            with model.disable_adapter():
                made = model.generate(input_ids=ids, **options)
        else:
            model.set_adapter(name)
            made = model.generate(input_ids=ids, **options)
        return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    return answer
