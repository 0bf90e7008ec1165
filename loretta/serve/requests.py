"""The bodies of requests, as OpenAI's protocol has them; what is not done is refused, unless it changes nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

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


class Asked(BaseModel):
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
    def _nothing_else(self) -> Asked:
        for name, value in (self.model_extra or {}).items():
            same = [value == neutral and type(value) is type(neutral) for neutral in NEUTRAL.get(name, ())]
            if name not in IGNORED and not any(same):
                raise ValueError(f"{name}: {'this value is' if name in NEUTRAL else 'is'} not supported")
        return self


class Completion(Asked):
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


class Chat(Asked):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
