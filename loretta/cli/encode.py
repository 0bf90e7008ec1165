"""Turns rows into token ids and labels, and batches of them into padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from loretta.cli.errors import UserError, one_line
from loretta.cli.rows import Row, Rows

IGNORED = -100


class Examples(Dataset):
    """Encoded examples: dicts of `input_ids` and `labels` (per token, or one class)."""

    def __init__(self, items: Sequence[dict[str, Any]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def first(self, count: int | None) -> "Examples":
        """The first `count` examples; all where it is None."""
        return Examples(self.items[:count])


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right; padding has no loss and no attention."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        per_token = isinstance(items[0]["labels"], list)

        def padded(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (width - len(values))

        return {
            "input_ids": torch.tensor([padded(item["input_ids"], self.pad_token_id) for item in items]),
            "attention_mask": torch.tensor([padded([1] * len(item["input_ids"]), 0) for item in items]),
            "labels": torch.tensor([padded(i["labels"], IGNORED) if per_token else i["labels"] for i in items]),
        }


def label_names(rows: Rows) -> list[str]:
    """The classes of a label data set, whole numbers in their order and names in the alphabet's."""
    names = {str(row.fields["label"]) for row in rows.rows}
    if len(names) < 2:
        raise UserError(f"{rows.source}: every row has the label {names.pop()!r}; there is nothing to tell apart")
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def encode(rows: Rows, tokenizer: Any, seq_len: int, labels: list[str] | None = None) -> Examples:
    """Encode rows of any kind into examples of at most `seq_len` tokens.

    Text becomes one stream cut into blocks; prompts and chats become one example each, with a loss on what the
    model should say only.

    Raises:
        UserError: where a row cannot be encoded, or nothing is left to learn from.
    """
    if rows.kind == "text":
        items = _blocks(rows, tokenizer, seq_len)
    elif rows.kind == "label":
        items = [_classified(row, tokenizer, seq_len, labels or []) for row in rows.rows]
    else:
        one = _completion if rows.kind == "completion" else _chat
        items = [_cut(*one(row, tokenizer), seq_len) for row in rows.rows]
        items = [item for item in items if any(label != IGNORED for label in item["labels"][1:])]
    if not items:
        raise UserError(f"{rows.source}: no row has anything to learn within {seq_len} tokens; raise --seq-len")
    return Examples(items)


def _blocks(rows: Rows, tokenizer: Any, seq_len: int) -> list[dict[str, Any]]:
    """One stream of documents with the end token between them, in blocks; a last token alone is dropped."""
    stream: list[int] = []
    for number, row in enumerate(rows.rows):
        if number and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += tokenizer(row.fields["text"], add_special_tokens=False, verbose=False)["input_ids"]
    blocks = [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]
    return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]


def _classified(row: Row, tokenizer: Any, seq_len: int, labels: list[str]) -> dict[str, Any]:
    """One text and the number of its class."""
    name = str(row.fields["label"])
    if name not in labels:
        raise UserError(f"{row.where}: the label {name!r} is none of the model's: {', '.join(labels)}")
    ids = tokenizer(row.fields["text"], truncation=True, max_length=seq_len, verbose=False)["input_ids"]
    return {"input_ids": ids, "labels": labels.index(name)}


def _completion(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A prompt without loss, then the completion and the end token with it."""
    prompt = tokenizer(row.fields["prompt"], verbose=False)["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        prompt = prompt[:-1]
    answer = tokenizer(row.fields["completion"], add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def _chat(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A chat by the model's template, with loss on the assistant's turns."""
    messages = row.fields["messages"]
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f'{row.where}: "messages" need a chat template, and the model\'s tokenizer has none')
    try:
        if "{% generation" in template or "{%- generation" in template:
            out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = out["input_ids"], out["assistant_masks"]
            return ids, [token if on else IGNORED for token, on in zip(ids, mask, strict=True)]
        text, spans = _rendered(messages, tokenizer)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    except Exception as error:  # a template is a program of its own and may raise anything
        raise UserError(f"{row.where}: the chat template refuses it: {one_line(error)}") from error
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    said = [any(start < stop and a < stop and start < b for a, b in spans) for start, stop in out["offset_mapping"]]
    return out["input_ids"], [token if on else IGNORED for token, on in zip(out["input_ids"], said, strict=True)]


def _rendered(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The whole chat as text, and the spans in it that the assistant says, found by rendering prefixes."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"the chat template renders the turns before message {number + 1} differently once it is there, "
                    "so what the assistant says cannot be told apart; give one assistant turn a row"
                )
            spans.append((len(before), len(after)))
    return text, spans


def _cut(ids: list[int], labels: list[int], seq_len: int) -> dict[str, Any]:
    """Cut an example at the right to the length allowed."""
    return {"input_ids": ids[:seq_len], "labels": labels[:seq_len]}
