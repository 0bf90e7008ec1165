"""Turns rows into token ids and labels, and batches of them into padded tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from loretta.cli.errors import UserError, one_line
from loretta.cli.report import say
from loretta.cli.rows import Row, Rows

IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """Encoded examples, dicts of `input_ids` and `labels` (one a token, or one) and what else the tokenizer gives.

    Attributes:
        cut: how many rows are longer than allowed; they end where the limit is.
        dropped: how many rows have nothing to learn from within the limit; they are not among the items.
    """

    items: list[dict[str, Any]]
    cut: int = 0
    dropped: int = 0

    def say_losses(self, what: str, seq_len: int) -> None:
        """Say which rows are not used, or not wholly."""
        if self.cut:
            say(f"{what}: {self.cut} rows are longer than {seq_len} tokens and end there")
        if self.dropped:
            say(f"{what}: {self.dropped} rows have nothing to learn within {seq_len} tokens and are left out")

    def counts(self) -> dict[str, int]:
        """The numbers for a record."""
        return {"examples": len(self.items), "cut": self.cut, "dropped": self.dropped}


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right; padding has no loss and no attention."""

    tokenizer: Any

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = [{name: value for name, value in item.items() if name != "labels"} for item in items]
        batch = dict(self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt", verbose=False))
        labels, width = [item["labels"] for item in items], batch["input_ids"].shape[1]
        if isinstance(labels[0], list):
            labels = [one + [IGNORED] * (width - len(one)) for one in labels]
        return batch | {"labels": torch.tensor(labels)}


def label_names(rows: Rows) -> list[str]:
    """The classes of labelled rows, whole numbers in their order and names in the alphabet's.

    Numbers of which one has a fraction are no classes: the list is empty, and the task a regression.
    """
    names = {row.fields["label"] for row in rows.rows}
    if len(names) < 2:
        raise UserError(f"{rows.source}: every row has the label {names.pop()!r}; there is nothing to tell apart")
    if all(_is_number(name) for name in names):
        whole = all(name.removeprefix("-").isdecimal() for name in names)
        return sorted(names, key=int) if whole else []
    return sorted(names)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def encode(rows: Rows, tokenizer: Any, seq_len: int, labels: list[str] | None = None) -> Examples:
    """Encode rows of any kind into examples of at most `seq_len` tokens.

    Text becomes one stream with the end token between documents, cut into blocks (a last token alone is dropped).
    Prompts and chats become one example each, with a loss on what the model should say only.

    Args:
        labels: the classes of labelled rows, none for a regression.

    Raises:
        UserError: where a row cannot be encoded, or nothing is left to learn from.
    """
    items, cut, dropped = list[dict[str, Any]](), 0, 0
    if rows.kind == "text":
        stream: list[int] = []
        for row in rows.rows:
            if stream and tokenizer.eos_token_id is not None:
                stream.append(tokenizer.eos_token_id)
            stream += tokenizer(row.fields["text"], add_special_tokens=False, verbose=False)["input_ids"]
        blocks = (stream[start : start + seq_len] for start in range(0, len(stream), seq_len))
        items = [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]
    for row in rows.rows if rows.kind != "text" else ():
        if rows.kind in ("label", "pair"):
            item = _labelled(row, tokenizer, labels or [])
            if len(item["input_ids"]) > seq_len:
                item, cut = _labelled(row, tokenizer, labels or [], truncation=True, max_length=seq_len), cut + 1
            items.append(item)
            continue
        ids, wanted = _completion(row, tokenizer) if rows.kind == "completion" else _chat(row, tokenizer)
        if all(label == IGNORED for label in wanted[1:seq_len]):
            dropped += 1
        else:
            items.append({"input_ids": ids[:seq_len], "labels": wanted[:seq_len]})
            cut += len(ids) > seq_len
    if not items:
        raise UserError(f"{rows.source}: no row has anything to learn within {seq_len} tokens; raise --seq-len")
    return Examples(items, cut, dropped)


def _labelled(row: Row, tokenizer: Any, labels: list[str], **options: Any) -> dict[str, Any]:
    """A text, or two, and the number of its class or its value."""
    label, texts = row.fields["label"], [row.fields[name] for name in ("text", "text_pair") if name in row.fields]
    if labels and label not in labels:
        raise UserError(f"{row.where}: the label {label!r} is none of the model's: {', '.join(labels)}")
    if not labels and not _is_number(label):
        raise UserError(f"{row.where}: the label {label!r} is no number, and the model's are: it is a regression")
    value = labels.index(label) if labels else float(label)
    return {**tokenizer(*texts, verbose=False, **options), "labels": value}


def _completion(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A prompt without loss, then the completion and the end token with it.

    Both are encoded as one text, as the model will meet them: apart, their tokens at the seam would be others. A token
    that reaches into the completion belongs to it.
    """
    prompt = row.fields["prompt"]
    out = tokenizer(prompt + row.fields["completion"], return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = out["input_ids"]
    if tokenizer.is_fast:
        learned = [stop > len(prompt) for _, stop in out["offset_mapping"]]
    else:
        pairs = zip(ids, tokenizer(prompt, verbose=False)["input_ids"], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        learned = [number >= same for number in range(len(ids))]
    if tokenizer.eos_token_id is not None:
        if ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            ids, learned = ids[:-1], learned[:-1]
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    return ids, _wanted(ids, learned)


def _chat(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A chat by the model's template, with loss on the assistant's turns."""
    messages, template = row.fields["messages"], tokenizer.chat_template
    if template is None:
        raise UserError(f'{row.where}: "messages" need a chat template, and the model\'s tokenizer has none')
    try:
        if "{% generation" in template or "{%- generation" in template:
            out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return out["input_ids"], _wanted(out["input_ids"], out["assistant_masks"])
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []  # what the assistant says, found by rendering the chat up to there
        for number in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"the chat template renders the turns before message {number + 1} differently once it is there, "
                    "so what the assistant says cannot be told apart; give one assistant turn a row"
                )
            spans.append((len(before), len(after)))
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    except Exception as error:  # a template is a program of its own and may raise anything
        raise UserError(f"{row.where}: the chat template refuses it: {one_line(error)}") from error
    said = [any(a < stop and start < b for a, b in spans) for start, stop in out["offset_mapping"]]
    return out["input_ids"], _wanted(out["input_ids"], said)


def _wanted(ids: Sequence[int], learned: Sequence[Any]) -> list[int]:
    """The labels of tokens: themselves where they are learned."""
    return [token if on else IGNORED for token, on in zip(ids, learned, strict=True)]
