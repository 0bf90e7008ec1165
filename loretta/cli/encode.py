"""Turns rows into token ids and labels, and pads batches of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from loretta.cli.report import UserError, log, refusing
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

    def log_omissions(self, what: str, seq_len: int) -> None:
        """Print how many rows are truncated or left out."""
        if self.cut:
            log(f"{what}: {self.cut} rows are longer than {seq_len} tokens and end there")
        if self.dropped:
            log(f"{what}: {self.dropped} rows have nothing to learn within {seq_len} tokens and are left out")

    def counts(self) -> dict[str, int]:
        """The numbers for a record."""
        return {"examples": len(self.items), "cut": self.cut, "dropped": self.dropped}


def make_collator(tokenizer: Any, labels: Sequence[str] | None) -> Any:
    """What pads a batch on the right; padding has no loss and no attention.

    Args:
        labels: None for examples with a label for every token.
    """
    tokenizer.padding_side = "right"
    return (DataCollatorForTokenClassification if labels is None else DataCollatorWithPadding)(tokenizer)


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
    Prompts and chats become one example each, with a loss on the completion or the assistant's turns only.

    Args:
        labels: the classes of labelled rows, none for a regression.
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
    elif rows.kind in ("label", "pair"):
        for row in rows.rows:
            item = _labelled(row, tokenizer, labels or [])
            if len(item["input_ids"]) > seq_len:
                item, cut = _labelled(row, tokenizer, labels or [], truncation=True, max_length=seq_len), cut + 1
            items.append(item)
    else:
        for row in rows.rows:
            ids, learned = _completion(row, tokenizer) if rows.kind == "completion" else _chat(row, tokenizer)
            if not any(learned[1:seq_len]):
                dropped += 1
                continue
            targets = [token if on else IGNORED for token, on in zip(ids, learned, strict=True)]
            items.append({"input_ids": ids[:seq_len], "labels": targets[:seq_len]})
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


def _completion(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a prompt, a completion and the end token, and which are learned: those after the prompt.

    Both are encoded as one text, as in generation; encoded apart, other tokens would stand where they meet. A token
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
    return ids, learned


def _chat(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a chat by the model's template, and which are learned: those of the assistant's turns."""
    messages, template = row.fields["messages"], tokenizer.chat_template
    if template is None:
        raise UserError(f'{row.where}: "messages" need a chat template, and the model\'s tokenizer has none')
    with refusing(f"{row.where}: the chat template refuses it", Exception):  # a template may raise anything
        if "{% generation" in template or "{%- generation" in template:
            out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return out["input_ids"], [bool(on) for on in out["assistant_masks"]]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []  # the assistant's turns in the text: each begins where the chat rendered up to there ends
        for number in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{row.where}: the chat template renders the turns before message {number + 1} differently once it "
                    "is there, so the assistant's turns cannot be located; give one assistant turn a row"
                )
            spans.append((len(before), len(after)))
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = out["offset_mapping"]
    return out["input_ids"], [any(a < stop and start < b for a, b in spans) for start, stop in offsets]
