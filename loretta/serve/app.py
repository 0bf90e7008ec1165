"""OpenAI's protocol over HTTP: completions and chat, streamed or not, and the models."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from starlette.exceptions import HTTPException

from loretta.serve.batching import Batcher, Job, Overloaded, Piece
from loretta.store import Damaged

NAMED = 20  # names that a 404 lists
MOST_BYTES = 2**22  # of a body
FAILED = "the server failed on this request"
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# What is not done is refused, unless it is asked for in a way that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none",), "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True, False), "modalities": (["text"],),
}  # fmt: skip


def _is_text(given: str) -> str:
    """The same; a ValueError where it has half of a surrogate pair, which JSON can write and nothing can encode."""
    given.encode()
    return given


Text = Annotated[str, AfterValidator(_is_text)]
Stop = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="allow")
    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _nothing_else(self) -> _Asked:
        for name, value in (self.model_extra or {}).items():
            same = [value == neutral and type(value) is type(neutral) for neutral in NEUTRAL.get(name, ())]
            if name not in IGNORED and not any(same):
                raise ValueError(f"{name}: {'this value is' if name in NEUTRAL else 'is'} not supported")
        return self


class _Completion(_Asked):
    prompt: Text


class _Text(BaseModel):
    type: Literal["text"]
    text: Text


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Text | list[_Text]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": parts}


class _Chat(_Asked):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class _Refused(Exception):
    """An answer in OpenAI's format of errors."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        clean = message.encode("utf-8", "backslashreplace").decode()
        self.body = {"error": {"message": clean, "type": kind, "param": param, "code": code}}
        self.status = status

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, {"Retry-After": "1"} if self.status == 429 else None)


def make_app(batcher: Batcher, base_name: str) -> FastAPI:
    """The application.

    Args:
        batcher: which generates; closed when the application ends.
        base_name: by which requests ask for the base model alone, whatever the store has under that name.
    """
    store, tokenizer, started = batcher.model.store, batcher.tokenizer, int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, max_body_size=MOST_BYTES)
    app.exception_handler(_Refused)(lambda _, error: error.response())
    app.exception_handler(HTTPException)(lambda _, error: _Refused(error.status_code, error.detail).response())
    app.exception_handler(Exception)(lambda _, error: _Refused(500, FAILED).response())

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _Refused(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None).response()

    def refresh() -> None:
        with suppress(OSError, ValueError):  # without a newer index the one at hand serves on
            store.refresh()

    def names() -> list[str]:
        return [base_name, *(name for name in store if name != base_name)]

    def check(name: str) -> None:
        """Raise unless there is such a model now."""
        refresh()
        if name != base_name and name not in store:
            found = names()
            rest = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            message = f"there is no model {name[:200]!r}; there are {', '.join(found[:NAMED])}{rest}"
            raise _Refused(404, message, "model_not_found", "model")

    def described(name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": started, "owned_by": "loretta"}
        return about if name == base_name else about | {"parent": base_name}

    @app.get("/health")
    async def health() -> Response:
        waiting, running = batcher.load
        return JSONResponse({"waiting": waiting, "running": running})

    @app.get("/v1/models")
    async def models() -> Response:
        refresh()
        return JSONResponse({"object": "list", "data": [described(name) for name in names()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check(name)
        return JSONResponse(described(name))

    @app.post("/v1/completions")
    async def completions(asked: _Completion, request: Request) -> Response:
        check(asked.model)
        ids = tokenizer(asked.prompt)["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        return await answer(request, asked, ids, asked.max_tokens or 16, is_chat=False)

    @app.post("/v1/chat/completions")
    async def chat(asked: _Chat, request: Request) -> Response:
        check(asked.model)
        if not tokenizer.chat_template:
            raise _Refused(400, "this model has no chat template; ask for /v1/completions")
        messages = [message.plain() for message in asked.messages]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        except TemplateError as error:
            raise _Refused(400, f"the model's chat template refuses the messages: {error}", param="messages") from error
        most = asked.max_completion_tokens or asked.max_tokens or max(1, batcher.context - len(ids))
        return await answer(request, asked, ids, most, is_chat=True)

    async def answer(request: Request, asked: _Asked, ids: list[int], most: int, is_chat: bool) -> Response:
        if not ids:
            raise _Refused(400, "the prompt is empty", param="prompt")
        if len(ids) + most > batcher.context:
            message = f"{len(ids)} tokens of prompt and {most} to generate are more than the model's {batcher.context}"
            raise _Refused(400, message, "context_length_exceeded")
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        adapter = None if asked.model == base_name else asked.model
        job = Job(
            ids,
            adapter,
            most,
            lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece),
            asked.temperature,
            asked.top_p,
            asked.seed,
            asked.stop,
        )
        texts = _texts(batcher, job, pieces)
        form = _Form(asked.model, job, is_chat)
        if asked.stream:
            events = form.events(texts, asked.stream_options.include_usage)
            first = await _unless_gone(request, anext(events))
            return StreamingResponse(_chain(first, events), media_type="text/event-stream")
        return JSONResponse(await _unless_gone(request, form.whole(texts)))

    return app


async def _texts(batcher: Batcher, job: Job, pieces: asyncio.Queue[Piece]) -> AsyncIterator[tuple[str, str | None]]:
    """Have the job generated: more of its text and, with the last, why it ended. Whoever stops early ends the job."""
    try:
        batcher.submit(job)
        reason = None
        while reason is None:
            text, reason = await pieces.get()
            if isinstance(reason, KeyError):
                raise _Refused(404, f"the model {job.adapter!r} was removed", "model_not_found", "model")
            if isinstance(reason, Exception):
                raise _Refused(500, str(reason) if isinstance(reason, Damaged) else FAILED)
            yield text, reason
    except Overloaded as error:
        raise _Refused(429, "as many requests wait as may; come again later", "overloaded") from error
    finally:
        batcher.leave(job)


class _Form:
    """How an answer is written."""

    def __init__(self, model: str, job: Job, is_chat: bool) -> None:
        self.job, self.is_chat = job, is_chat
        kind = "chat.completion" if is_chat else "text_completion"
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.about = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def usage(self) -> dict[str, int]:
        prompt, generated = len(self.job.prompt), self.job.tokens
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def choice(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    async def whole(self, texts: AsyncIterator[tuple[str, str | None]]) -> dict[str, Any]:
        """The answer at once."""
        pieces = [piece async for piece in texts]
        text, reason = "".join(text for text, _ in pieces), pieces[-1][1]
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return self.about | {"choices": [self.choice(content, reason)], "usage": self.usage()}

    async def events(self, texts: AsyncIterator[tuple[str, str | None]], with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. What goes wrong before the first is raised, later it is an event."""
        about = self.about | ({"object": "chat.completion.chunk"} if self.is_chat else {})
        role = {"role": "assistant"}
        try:
            async for text, reason in texts:
                content = {"delta": role | {"content": text}} if self.is_chat else {"text": text}
                yield _event(about | {"choices": [self.choice(content, reason)]})
                role = {}
            if with_usage:
                yield _event(about | {"choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except _Refused as error:
            if role:
                raise
            yield _event(error.body)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _chain(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for other in others:
        yield other


async def _unless_gone(request: Request, wanted: Awaitable[Any]) -> Any:
    """What is wanted; it is cancelled when the client leaves."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(wanted), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise _Refused(499, "the client has gone")
    finally:
        for task in tasks:
            task.cancel()
