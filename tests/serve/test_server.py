"""Answers are those of `generate` alone, nothing a client does is an error of the server, nothing is left behind."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.serve.conftest import NAMES, httpx

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def streamed(response: Any) -> tuple[list[dict[str, Any]], str]:
    """The events of a streamed answer, the last of which must be the end, and the text in them."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    choices = [choice for event in events for choice in event["choices"]]
    return events, "".join(choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices)


def ask(url: str, number: int) -> tuple[str, str, int, str]:
    """One of 200 requests: some of the base, some chats, some streamed; its model, prompt, length and answer."""
    draw = random.Random(number)
    name = draw.choice([*NAMES, "base"])
    prompt = "".join(draw.choices(LETTERS, k=draw.randint(1, 40)))
    body: dict[str, Any] = {"model": name, "max_tokens": draw.randint(1, 24), "temperature": 0}
    is_chat, is_streamed = draw.random() < 0.3, draw.random() < 0.5
    body |= {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    path = f"{url}/v1/{'chat/' if is_chat else ''}completions"
    if is_streamed:
        with httpx.stream("POST", path, json=body | {"stream": True}, timeout=120) as response:
            assert response.status_code == 200
            text = streamed(response)[1]
    else:
        response = httpx.post(path, json=body, timeout=120)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        text = choice["message"]["content"] if is_chat else choice["text"]
    whole = f"<user>{prompt}</s><assistant>" if is_chat else prompt
    return name, whole, body["max_tokens"], text


def test_two_hundred_requests_from_sixteen_clients_are_answered_as_alone(serve, alone) -> None:
    server = serve()
    sizes = []
    generate = server.batcher.model.generate
    server.batcher.model.generate = lambda names, **options: sizes.append(len(set(names))) or generate(names, **options)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda number: ask(server.url, number), range(200)))
    for name, prompt, max_tokens, text in answers:
        assert text == alone(name, prompt, max_tokens), (name, prompt)
    assert len({text for *_, text in answers}) > 150
    assert max(sizes) > 4  # adapters in one batch
    assert server.idle()
