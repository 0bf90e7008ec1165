"""Reads .txt, .jsonl and .csv files (or a hub data set) into rows of one kind, checking every line."""

import csv
import io
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.cli.errors import UserError, one_line

SUFFIXES = (".txt", ".jsonl", ".csv")
ROLES = ("system", "user", "assistant", "tool")
CSV_FIELD_LIMIT = 1 << 30
FIELDS = {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",), "label": ("text", "label")}
ACCEPTED = {
    "causal_lm": '"text", or "prompt" and "completion", or "messages"',
    "seq_cls": '"text" and "label"',
}


@dataclass(frozen=True)
class Row:
    """One example: where it stands, and its fields."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of one source, all of one kind: text, completion, chat or label."""

    source: str
    kind: str
    rows: list[Row]

    def held_out(self, fraction: float) -> tuple["Rows", "Rows"]:
        """Split into a training and a held-out part.

        Text is cut once, so that what is held out is the contiguous end of it; rows of the other kinds stand
        for themselves and may be sorted, so those are drawn at random (always the same ones).
        """
        if self.kind == "text" and len(self.rows) == 1:
            head, tail = _split_text(self.rows[0].fields["text"], fraction)
            parts = [[Row(self.rows[0].where, {"text": part})] for part in (head, tail) if part.strip()]
        else:
            rows = list(self.rows)
            if self.kind != "text":
                random.Random(0).shuffle(rows)
            cut = len(rows) - max(1, round(len(rows) * fraction))
            parts = [part for part in (rows[:cut], rows[cut:]) if part]
        if len(parts) < 2:
            raise UserError(f"{self.source}: too short to hold out {fraction:g} of it; give --eval-data instead")
        return Rows(self.source, self.kind, parts[0]), Rows(self.source, self.kind, parts[1])


def read_rows(source: str, task: str) -> Rows:
    """Read a file, or else a hub data set, for task "causal_lm" or "seq_cls".

    Raises:
        UserError: naming the file and the line for whatever cannot be used.
    """
    path = Path(source)
    if path.is_file():
        numbered: Iterable[tuple[str, Any]] = _read_file(path)
    elif path.is_dir():
        raise UserError(f"{source}: is a folder; give a file ({', '.join(SUFFIXES)})")
    elif path.suffix in SUFFIXES or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such file")
    else:
        numbered = _read_hub(source)
    kind, rows = None, []
    for where, fields in numbered:
        row_kind = _checked_kind(where, fields, task)
        if kind not in (None, row_kind):
            raise UserError(f"{where}: a {row_kind} row after {kind} rows; all rows must be of one kind")
        kind = row_kind
        rows.append(Row(where, {name: fields[name] for name in FIELDS[kind]}))
    if kind is None:
        raise UserError(f"{source}: no rows in it")
    return Rows(source, kind, rows)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of (file and line, fields)."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown format {path.suffix or '(no suffix)'!r}; accepted: {', '.join(SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    if path.suffix == ".txt":
        return iter([(f"{path}:1", {"text": text})])
    return _read_jsonl(path, text) if path.suffix == ".jsonl" else _read_csv(path, text)


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """One JSON value a line; blank lines are allowed at the end only."""
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: empty line")
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {one_line(error)}") from error


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """A header line, then records; a record is named by the line it begins on."""
    csv.field_size_limit(CSV_FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where}: not valid CSV: {error}") from error
        if record is None:
            return
        if not record:
            raise UserError(f"{where}: empty line")
        if header is None:
            header = record
            if len(set(header)) < len(header):
                raise UserError(f"{where}: a column name is given twice in the header")
        elif len(record) != len(header):
            raise UserError(f"{where}: {len(record)} fields where the header has {len(header)}")
        else:
            yield where, dict(zip(header, record, strict=True))


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    """The training split of a hub data set."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{source}: no such file; to read it as a hub data set, install the package: pip install datasets"
        ) from error
    try:
        rows = load_dataset(source, split="train")
    except Exception as error:  # the hub client raises many kinds; all mean that this id cannot be had
        raise UserError(f"{source}: no such file, and no such hub data set: {one_line(error)}") from error
    return ((f"{source} row {number}", dict(row)) for number, row in enumerate(rows, 1))


def _checked_kind(where: str, fields: Any, task: str) -> str:
    """Which kind of row this is, after checking every field that the kind has."""
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object; a row needs {ACCEPTED[task]}")
    kinds = ("label",) if task == "seq_cls" else ("chat", "completion", "text")
    found = [kind for kind in kinds if all(name in fields for name in FIELDS[kind])]
    if len(found) != 1:
        names = ", ".join(map(str, fields)) or "nothing"
        problem = "is ambiguous" if found else "cannot be used"
        raise UserError(f"{where}: a row with {names} {problem}; it needs {ACCEPTED[task]}")
    for name in FIELDS[found[0]]:
        if name == "messages":
            _check_messages(where, fields[name])
        elif name == "label":
            if isinstance(fields[name], bool) or not isinstance(fields[name], int | str) or fields[name] == "":
                raise UserError(f'{where}: "label" is {fields[name]!r}; it must be a name or a whole number')
        else:
            _check_text(where, f'"{name}"', fields[name])
    return found[0]


def _check_text(where: str, name: str, value: Any) -> None:
    """A string that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is a {type(value).__name__}; it must be a string")
    if not value.strip():
        raise UserError(f"{where}: {name} is empty")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(f"{where}: {name} has half of a surrogate pair, which is no text")


def _check_messages(where: str, messages: Any) -> None:
    """A list of {"role", "content"} with at least one assistant turn to learn from."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "messages" must be a list of {{"role": ..., "content": ...}}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {number} needs a role, one of {', '.join(ROLES)}")
        _check_text(where, f"the content of message {number}", message.get("content"))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no message has the role assistant, so there is nothing to learn")


def _split_text(text: str, fraction: float) -> tuple[str, str]:
    """Cut one text at the white space that follows its first (1 - fraction)."""
    cut = int(len(text) * (1 - fraction))
    while cut < len(text) and not text[cut].isspace():
        cut += 1
    return text[:cut], text[cut:]
