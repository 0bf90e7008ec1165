"""Answers are those of `generate` alone, nothing a client does is an error of the server, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.conftest import NAMES

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def streamed(response: Any) -> tuple[list[dict[str, Any]], str]:
    """The events of a streamed answer, the last of which must be the end, and the text in them."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    choices = [choice for event in events for choice in event["choices"]]
    return events, "".join(choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices)


def ask(server: Any, number: int) -> tuple[str, str, int, str]:
    """One of 200 requests: some of the base, some chats, some streamed; its model, prompt, length and answer."""
    draw = random.Random(number)
    name = draw.choice([*NAMES, "base"])
    prompt = "".join(draw.choices(LETTERS, k=draw.randint(1, 40)))
    body: dict[str, Any] = {"model": name, "max_tokens": draw.randint(1, 24), "temperature": 0}
    is_chat, is_streamed = draw.random() < 0.3, draw.random() < 0.5
    body |= {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    path = f"{server.url}/v1/{'chat/' if is_chat else ''}completions"
    if is_streamed:
        with server.client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200
            text = streamed(response)[1]
    else:
        response = server.client.post(path, json=body)
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
        answers = list(clients.map(lambda number: ask(server, number), range(200)))
    for name, prompt, max_tokens, text in answers:
        assert text == alone(name, prompt, max_tokens), (name, prompt)
    assert len({text for *_, text in answers}) > 150
    assert max(sizes) > 4  # adapters in one batch
    assert server.idle()


@pytest.fixture(scope="module")
def talker(alone) -> str:
    """An adapter that answers "abcd" at length."""
    return next(name for name in NAMES if len(alone(name, "abcd", 5)) == 5 and len(alone(name, "abcd", 400)) > 200)


def test_an_answer_has_openai_s_form(serve, talker) -> None:
    server = serve()
    body = {"model": talker, "prompt": "abcd", "max_tokens": 5}
    answer = server.post(**body).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == talker
    (choice,) = answer["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["finish_reason"], len(choice["text"])) == (0, "length", 5)
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    with server.client.stream(
        "POST", f"{server.url}/v1/completions",
        json=body | {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}},
    ) as response:  # fmt: skip
        assert response.headers["content-type"].startswith("text/event-stream")
        events, text = streamed(response)
    assert text == choice["text"]
    assert len({event["id"] for event in events}) == 1
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 4 + ["length"]
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], answer["usage"])

    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "ab"}]}], "max_completion_tokens": 4}
    answer = server.post("chat/completions", **body).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    with server.client.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body | {"model": "base", "temperature": 0, "stream": True}
    ) as response:
        events, text = streamed(response)
    assert text == answer["choices"][0]["message"]["content"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert [event["choices"][0]["delta"].get("role") for event in events] == ["assistant"] + [None] * (len(events) - 1)
    assert len(events) > 1


def test_the_models_are_the_base_and_the_adapters_of_now(serve, folders) -> None:
    server = serve()
    listed = server.client.get(f"{server.url}/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["base", *NAMES]
    other = type(server.store)(server.store.folder)
    other.remove([NAMES[0]])
    other.add({"new": folders[NAMES[1]]})
    assert server.client.get(f"{server.url}/v1/models/{NAMES[0]}").status_code == 404
    assert server.client.get(f"{server.url}/v1/models/new").json()["parent"] == "base"
    answers = [server.post(model=name, prompt="abc", max_tokens=8) for name in ("new", NAMES[1], NAMES[0])]
    assert [answer.status_code for answer in answers] == [200, 200, 404]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def expect_error(response: Any, *statuses: int) -> dict[str, Any]:
    """The error of an answer in OpenAI's format."""
    assert response.status_code in statuses, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_an_unknown_model_is_a_404_with_some_names(serve) -> None:
    server = serve()
    error = expect_error(server.post(model="nobody", prompt="a"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"].startswith("there is no model 'nobody'; there are base, adapter-0, ")
    assert error["message"].endswith(" and 1 more")  # of 21, 20 are named
    expect_error(server.post(model="x" * 100000, prompt="a"), 404)


GOOD = {"model": "base", "prompt": "abc", "max_tokens": 2}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
MALFORMED: dict[str, tuple[str, Any]] = {
    "no-body": ("completions", b""),
    "no-json": ("completions", b"{"),
    "not-utf-8": ("completions", b'{"model": "\xff"}'),
    "half-a-surrogate-pair": ("completions", b'{"model": "base", "prompt": "\\ud800"}'),
    "half-a-pair-as-a-name": ("completions", b'{"model": "\\ud800", "prompt": "a"}'),
    "half-a-pair-as-a-field": ("completions", b'{"model": "base", "prompt": "a", "\\ud800": 1}'),
    "nested": ("completions", b'{"model": "base", "prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "half-a-pair-in-a-message": (
        "chat/completions",
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ),
    "nested-deeply": ("completions", b"[" * 100000),
    "a-number-of-5000-digits": ("completions", b'{"seed": ' + b"1" * 5000 + b"}"),
    "too-many-bytes": ("completions", b'{"prompt": "' + b"a" * 2**22 + b'"}'),
    "a-list": ("completions", [GOOD]),
    "null": ("completions", b"null"),
    "no-model": ("completions", {"prompt": "abc"}),
    "no-prompt": ("completions", {"model": "base"}),
    "empty-prompt": ("completions", GOOD | {"prompt": ""}),
    "prompt-is-a-number": ("completions", GOOD | {"prompt": 3}),
    "prompts": ("completions", GOOD | {"prompt": ["a", "b"]}),
    "prompt-too-long": ("completions", GOOD | {"prompt": "a" * 600}),
    "too-many-tokens": ("completions", GOOD | {"max_tokens": 10**9}),
    "no-tokens": ("completions", GOOD | {"max_tokens": 0}),
    "temperature-below-0": ("completions", GOOD | {"temperature": -1}),
    "temperature-nan": ("completions", b'{"model": "base", "prompt": "a", "temperature": NaN}'),
    "top-p-0": ("completions", GOOD | {"top_p": 0}),
    "seed-too-large": ("completions", GOOD | {"seed": 2**70}),
    "empty-stop": ("completions", GOOD | {"stop": ""}),
    "stops": ("completions", GOOD | {"stop": ["a"] * 5}),
    "two-answers": ("completions", GOOD | {"n": 2}),
    "log-probabilities": ("completions", GOOD | {"logprobs": 0}),
    "unknown-field": ("completions", GOOD | {"beams": 4}),
    "stream-is-a-text": ("completions", GOOD | {"stream": "perhaps"}),
    "no-messages": ("chat/completions", CHAT | {"messages": []}),
    "a-message-is-a-text": ("chat/completions", CHAT | {"messages": ["a"]}),
    "unknown-role": ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "a"}]}),
    "an-image": ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    "tools": ("chat/completions", CHAT | {"tools": [{"type": "function"}]}),
    "refused-by-the-template": ("chat/completions", CHAT),
}


def test_malformed_requests_are_errors_of_the_client(serve) -> None:
    server = serve()
    template = server.tokenizer.chat_template
    for name, (path, body) in MALFORMED.items():
        if name == "refused-by-the-template":
            server.tokenizer.chat_template = "{{ raise_exception('no') }}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        for streaming in (b"", b'{"stream": true, '):
            if streaming and not content.startswith(b'{"'):
                continue
            sent = streaming + content[1:] if streaming else content
            answer = server.client.post(
                f"{server.url}/v1/{path}", content=sent, headers={"content-type": "application/json"}
            )
            if name == "too-many-bytes":
                assert answer.status_code == 413
            else:
                expect_error(answer, 400)
    server.tokenizer.chat_template = None
    expect_error(server.client.post(f"{server.url}/v1/chat/completions", json=CHAT), 400)
    server.tokenizer.chat_template = template
    expect_error(server.client.post(f"{server.url}/v1/completions", content=json.dumps(GOOD)), 400)  # no content type
    expect_error(server.client.get(f"{server.url}/v1/completions"), 405)
    expect_error(server.client.post(f"{server.url}/v2/completions", json=GOOD), 404)
    assert server.post(**GOOD, n=1, user="me", logprobs=None, seed=None).status_code == 200
    assert server.post("chat/completions", **CHAT).status_code == 200
    assert server.idle()


def held(server: Any) -> threading.Event:
    """Until this is set no batch begins."""
    go, generate = threading.Event(), server.batcher.model.generate

    def wait(names: Any, **options: Any) -> Any:
        assert go.wait(30)
        return generate(names, **options)

    server.batcher.model.generate = wait
    return go


def until(holds: Any) -> None:
    """Wait for it, ten seconds at most."""
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def test_more_than_may_wait_are_told_to_come_again(serve) -> None:
    server = serve(max_batch=2, max_waiting=3)
    go = held(server)
    with ThreadPoolExecutor(8) as clients:
        first = clients.submit(server.post, **GOOD)
        until(lambda: server.batcher.load == (0, 1))
        waiting = [clients.submit(server.post, **GOOD) for _ in range(3)]
        until(lambda: server.batcher.load == (3, 1))
        for stream in (False, True):
            refused = server.post(**GOOD, stream=stream)
            assert expect_error(refused, 429)["type"] == "rate_limit_error"
            assert refused.headers["retry-after"] == "1"
        go.set()
        assert [answer.result().status_code for answer in (first, *waiting)] == [200] * 4
    assert server.post(**GOOD).status_code == 200


def begin(server: Any, body: Any) -> socket.socket:
    """A request whose client leaves when this is closed."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    client = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    client.sendall(f"{head}\r\n\r\n".encode() + content)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(serve, stream, talker) -> None:
    server = serve(max_batch=2)
    steps: list[None] = []
    server.batcher.model.model.get_base_model().register_forward_hook(lambda *_: steps.append(time.sleep(0.02)))
    go = held(server)
    long = {"model": talker, "prompt": "abcd", "max_tokens": 400, "stream": stream, "temperature": 0}
    clients = []
    for waiting in range(4):  # one is generated, two are the next batch, one waits for it
        clients.append(begin(server, long))
        until(lambda: server.batcher.load == (waiting, 1))  # noqa: B023
    with ThreadPoolExecutor(1) as other:
        stays = other.submit(server.post, **GOOD)
        until(lambda: server.batcher.load == (4, 1))
        clients[3].close()
        until(lambda: server.batcher.load == (3, 1))
        go.set()
        until(lambda: len(steps) > 3)
        clients[0].close()
        until(lambda: server.batcher.load[1] == 2)  # the next batch
        clients[1].close()
        until(lambda: server.batcher.load[1] == 1)  # its other row goes on
        clients[2].close()
        assert stays.result().status_code == 200
    assert server.idle()
    assert len(steps) < 300
    left_behind(server)


def left_behind(server: Any) -> None:
    """Fail unless all jobs and tasks of requests are soon gone."""
    until(lambda: server.batcher.load == (0, 0))
    until(lambda: not asyncio.run_coroutine_threadsafe(_tasks(), server.loop).result(10))
    until(lambda: gc.collect() >= 0 and not any(type(thing).__name__ == "Job" for thing in gc.get_objects()))


async def _tasks() -> list[str]:
    """The tasks of requests."""
    names = [str(task.get_coro()) for task in asyncio.all_tasks()]
    return [name for name in names if any(part in name for part in ("run_asgi", "_texts", "until_gone", "whole"))]


def test_a_failure_ends_its_batch_alone(serve, capsys) -> None:
    server = serve()
    generate = server.batcher.model.generate
    server.batcher.model.generate = lambda *_, **__: 1 / 0
    error = expect_error(server.post(**GOOD), 500)
    assert error["message"] == "the server failed on this request"
    assert "ZeroDivisionError" in capsys.readouterr().err
    server.batcher.model.generate = generate
    assert server.post(**GOOD).status_code == 200
    left_behind(server)


def test_an_adapter_that_goes_while_a_request_waits_costs_that_request_alone(serve) -> None:
    server = serve(max_batch=4)
    go = held(server)
    with ThreadPoolExecutor(4) as clients:
        first = clients.submit(server.post, **GOOD)
        until(lambda: server.batcher.load == (0, 1))
        names = [NAMES[0], NAMES[1], NAMES[2]]
        answers = [clients.submit(server.post, **GOOD | {"model": name}) for name in names]
        until(lambda: server.batcher.load == (3, 1))
        server.store.remove([NAMES[0]])
        with open(server.store.folder / "rows-0.bin", "r+b") as file:
            file.seek(server.store.nbytes // 19 + 7)  # in the row of NAMES[1]
            file.write(b"x")
        go.set()
        assert first.result().status_code == 200
        assert "was removed" in expect_error(answers[0].result(), 404)["message"]
        assert "adapter-1 are damaged" in expect_error(answers[1].result(), 500)["message"]
        assert answers[2].result().status_code == 200
    left_behind(server)


def test_drawn_answers_follow_their_seed_and_their_probabilities(serve) -> None:
    server = serve()
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 1.5, "model": NAMES[5]}

    def texts(*seeds: int | None, **more: Any) -> list[str]:
        with ThreadPoolExecutor(8) as clients:
            answers = clients.map(lambda seed: server.post(**body | {"seed": seed} | more).json(), seeds)
            return [answer["choices"][0]["text"] for answer in answers]

    same = texts(*[7] * 6)
    assert len(set(same)) == 1
    assert len(set(texts(*range(12)))) == 12
    assert len(set(texts(*[None] * 12))) == 12
    likeliest = server.post(**body | {"temperature": 0}).json()["choices"][0]["text"]
    for least in ({"top_p": 1e-6}, {"top_p": 1e-320}, {"temperature": 1e-300}):
        assert set(texts(-(2**63), 0, 2**63 - 1, **least)) == {likeliest}


def test_an_answer_ends_before_a_stop(serve, talker) -> None:
    server = serve()
    whole = server.post(prompt="abcd", max_tokens=40, model=talker).json()["choices"][0]["text"]
    stop = whole[10:13]
    at = whole.index(stop)
    for stops in (stop, [stop, "no such text"]):
        (choice,) = server.post(prompt="abcd", max_tokens=40, model=talker, stop=stops).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole[:at], "stop")
