"""Reads files and hub data sets into rows of one kind; errors name the line."""

import csv
import gzip
import io
import json
import math
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.cli.report import UserError, need, refusing

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
KINDS = {  # by task: the kinds of rows and the fields of each
    "causal_lm": {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)},
    "seq_cls": {"label": ("text", "label"), "pair": ("text", "text_pair", "label")},
}
ACCEPTED = {
    "causal_lm": '"text", or "prompt" and "completion", or "messages"',
    "seq_cls": '"text" and "label", and "text_pair" where there are two texts',
}
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}  # "from" -> "role"
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


@dataclass(frozen=True)
class Row:
    """One example: its place (file and line) for messages, and its fields."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of one kind: text, completion, chat, label or pair."""

    source: str
    kind: str
    rows: list[Row]

    def held_out(self, fraction: float) -> tuple["Rows", "Rows"]:
        """Split into a training and a held-out part.

        One text is split at a blank, so that its contiguous end is held out. Rows of the other kinds are independent
        and may be sorted, so they are drawn at random, always the same ones; one row of every class stays in training.
        """
        rows = list(self.rows)
        if self.kind == "text" and len(rows) == 1:
            where, text = rows[0].where, rows[0].fields["text"]
            cut = int(len(text) * (1 - fraction))
            while cut < len(text) and not text[cut].isspace():
                cut += 1
            rows, cut = [Row(where, {"text": part}) for part in (text[:cut], text[cut:]) if part.strip()], 1
        else:
            if self.kind != "text":
                random.Random(0).shuffle(rows)
            if "label" in rows[0].fields:
                first = {id(row) for row in {row.fields["label"]: row for row in rows}.values()}
                rows.sort(key=lambda row: id(row) not in first)
            cut = len(rows) - max(1, round(len(rows) * fraction))
        if not 0 < cut < len(rows):
            raise UserError(f"{self.source}: too short to hold out {fraction:g} of it; give --eval-data instead")
        return Rows(self.source, self.kind, rows[:cut]), Rows(self.source, self.kind, rows[cut:])


def read_rows(sources: Sequence[str], task: str, columns: Mapping[str, str] | None = None) -> Rows:
    """Read files or hub data sets for task "causal_lm" or "seq_cls"; errors name the file and the line.

    Args:
        sources: paths, or hub ids as ID[:CONFIG[:SPLIT]].
        columns: the names of columns in the data, by the names of fields here.
    """
    kind, rows = "", list[Row]()
    for source in sources:
        path = Path(source).expanduser()
        is_path = _suffix(path) in SUFFIXES or path.is_absolute() or source[:1] in (".", "~") or source.count("/") > 1
        if path.is_dir():
            raise UserError(f"{source}: is a folder; give its files ({', '.join(SUFFIXES)})")
        if is_path and not path.is_file():
            raise UserError(f"{source}: no such file")
        count = len(rows)
        for where, found in _read_file(path) if path.is_file() else _read_hub(source):
            row_kind, fields = _checked(where, found, task, columns or {})
            if kind not in ("", row_kind):
                raise UserError(f"{where}: a {row_kind} row after {kind} rows; all rows must be of one kind")
            kind = row_kind
            rows.append(Row(where, fields))
        if len(rows) == count:
            raise UserError(f"{source}: no rows in it")
    return Rows(" ".join(sources), kind, rows)


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path) -> Iterable[tuple[str, Any]]:
    """Pairs of a place for messages (file and line, or row) and the value that was read there."""
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown format {suffix or '(no suffix)'!r}; accepted: {', '.join(SUFFIXES)}, and .gz")
    with refusing(f"{path}: cannot be read", OSError):
        data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        with refusing(f"{path}: not valid gzip", OSError, EOFError, zlib.error):
            data = gzip.decompress(data)
    if suffix == ".parquet":
        return _read_parquet(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{error.object[: error.start].count(10) + 1}: not UTF-8 text") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    if suffix == ".txt":
        return [(f"{path}:1", {"text": text})]
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, text, "\t" if suffix == ".tsv" else max(",;\t", key=text.partition("\n")[0].count))
    if suffix == ".json" and text.lstrip().startswith("["):
        return ((f"{path} row {number}", row) for number, row in enumerate(_json(str(path), text), 1))
    lines = ((f"{path}:{number}", line) for number, line in enumerate(text.rstrip().split("\n"), 1))
    return ((where, _json(where, line)) for where, line in lines)


def _json(where: str, text: str) -> Any:
    if not text.strip():
        raise UserError(f"{where}: empty line")
    with refusing(f"{where}: not valid JSON", ValueError, RecursionError):
        return json.loads(text)


def _read_csv(path: Path, text: str, delimiter: str) -> Iterable[tuple[str, Any]]:
    """A header line, then records; a record is named by the line it begins on."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), delimiter=delimiter, strict=True)
    header, line = list[str](), 1
    try:
        for record in reader:
            if not record:
                raise UserError(f"{path}:{line}: empty line")
            if not header:
                header = record
                if len(set(header)) < len(header):
                    raise UserError(f"{path}:{line}: a column name is given twice in the header")
            elif len(record) != len(header):
                raise UserError(f"{path}:{line}: {len(record)} fields where the header has {len(header)}")
            else:
                yield f"{path}:{line}", dict(zip(header, record, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV: {error}") from error


def _read_parquet(path: Path, data: bytes) -> Iterable[tuple[str, Any]]:
    need("datasets", f"{path}:", "data")
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import ArrowException, parquet

    with refusing(f"{path}: not valid Parquet", OSError, ArrowException, ValueError):
        rows = Dataset(InMemoryTable(parquet.read_table(io.BytesIO(data))))
    return _with_names(str(path), rows)


def _read_hub(source: str) -> Iterable[tuple[str, Any]]:
    name, config, split, *_ = [*source.split(":"), "", ""]
    need("datasets", f"{source}: no such file; a hub data set", "data")
    from datasets import load_dataset

    with refusing(f"{source}: no such file, and no such hub data set", Exception):  # the hub client raises many kinds
        rows = load_dataset(name, config or None, split=split or "train")
    return _with_names(source, rows)


def _with_names(source: str, rows: Any) -> Iterable[tuple[str, Any]]:
    """The rows of a data set, its classes by their names; -1 stands for no class."""
    names = {column: feature.names for column, feature in rows.features.items() if hasattr(feature, "names")}
    for number, row in enumerate(rows, 1):
        for column in names:
            row[column] = None if row[column] in (None, -1) else names[column][row[column]]
        yield f"{source} row {number}", row


def _checked(where: str, found: Any, task: str, columns: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Which kind of row this is, and the fields that the kind has, each checked."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: not a JSON object; a row needs {ACCEPTED[task]}")
    for column in columns.values():
        if column not in found:
            raise UserError(f"{where}: no column {column!r} (--columns); it has {', '.join(map(str, found))}")
    fields = {name: value for name, value in found.items() if name not in columns.values()}
    fields |= {name: found[column] for name, column in columns.items()}
    fields = _in_our_names(where, {name: value for name, value in fields.items() if value is not None})
    kinds = [kind for kind, names in KINDS[task].items() if all(name in fields for name in names)]
    if len(kinds) != 1 and kinds != ["label", "pair"]:
        problem = f"{', '.join(map(str, found)) or 'nothing'} {'is ambiguous' if kinds else 'cannot be used'}"
        raise UserError(f"{where}: a row with {problem}; it needs {ACCEPTED[task]}")
    fields = {name: fields[name] for name in KINDS[task][kinds[-1]]}
    for name, value in fields.items():
        if name == "label":
            fields[name] = _label(where, value)
        elif name == "messages":
            _check_messages(where, value)
        else:
            _check_text(where, f'"{name}"', value)
    return kinds[-1], fields


def _in_our_names(where: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Rows of Alpaca's (instruction, input, output) and ShareGPT's (conversations) layout in our names."""
    if "instruction" in fields and "output" in fields:
        given = fields.get("input") or ""
        for name, text in {"instruction": fields["instruction"], "input": given or "none"}.items():
            _check_text(where, f'"{name}"', text)
        further = ", paired with an input that provides further context" if given else ""
        prompt = ALPACA.format(further, fields["instruction"], f"### Input:\n{given}\n\n" if given else "")
        return {"prompt": prompt, "completion": fields["output"]}
    turns = fields.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return {"messages": [{"role": SHAREGPT.get(str(t["from"])), "content": t.get("value")} for t in turns]}
    return fields


def _label(where: str, value: Any) -> str:
    """A label as text, without blanks around it; a whole number has no fraction and a truth value no capital."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise UserError(f'{where}: "label" is {value!r}; it must be a name or a number')


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
