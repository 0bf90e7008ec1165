"""Every format is read as documented, and every malformed line is refused by its number."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from loretta.cli.errors import UserError
from loretta.cli.rows import Row, Rows, read_rows

CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'

GOOD = {
    "text-as-one-document": ("a.txt", "one\n\ntwo\n", "causal_lm", "text", [{"text": "one\n\ntwo\n"}]),
    "byte-order-mark": ("a.txt", "\ufeffone", "causal_lm", "text", [{"text": "one"}]),
    "jsonl-text": ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n', "causal_lm", "text", [{"text": "a"}, {"text": "b"}]),
    "blank-lines-at-the-end": ("a.jsonl", '{"text": "a"}\r\n\r\n \n', "causal_lm", "text", [{"text": "a"}]),
    "line-separator-inside-a-string": ("a.jsonl", '{"text": "a\u2028b"}', "causal_lm", "text", [{"text": "a\u2028b"}]),
    "further-fields-are-dropped": ("a.jsonl", '{"text": "a", "id": 3}', "causal_lm", "text", [{"text": "a"}]),
    "jsonl-completion": (
        "a.jsonl",
        '{"prompt": "p", "completion": "c"}',
        "causal_lm",
        "completion",
        [{"prompt": "p", "completion": "c"}],
    ),
    "jsonl-label": ("a.jsonl", '{"text": "a", "label": 1}', "seq_cls", "label", [{"text": "a", "label": 1}]),
    "label-unused-by-a-language-model": ("a.jsonl", '{"text": "a", "label": 1}', "causal_lm", "text", [{"text": "a"}]),
    "csv-completion": (
        "a.csv",
        "completion,prompt\nc,p\n",
        "causal_lm",
        "completion",
        [{"prompt": "p", "completion": "c"}],
    ),
    "csv-quotes": ("a.csv", 'text,label\n"a, ""b""\nc",x\n', "seq_cls", "label", [{"text": 'a, "b"\nc', "label": "x"}]),
    "csv-windows-line-ends": ("a.csv", "text\r\na\r\nb\r\n\r\n", "causal_lm", "text", [{"text": "a"}, {"text": "b"}]),
}

OK = '{"text": "a"}\n'
BAD = {
    "empty-file": ("a.txt", "", "causal_lm", "a.txt: the file is empty"),
    "blank-file": ("a.jsonl", "\n \n", "causal_lm", "a.jsonl: the file is empty"),
    "header-only": ("a.csv", "text,label\n", "seq_cls", "a.csv: no rows"),
    "unknown-suffix": ("a.json", "{}", "causal_lm", "a.json: unknown format '.json'; accepted: .txt, .jsonl, .csv"),
    "not-utf-8": ("a.txt", b"fine\n\xff", "causal_lm", "a.txt:2: not UTF-8"),
    "empty-line": ("a.jsonl", OK + "\n" + OK, "causal_lm", "a.jsonl:2: empty line"),
    "broken-json": ("a.jsonl", OK + OK + '{"text": \n', "causal_lm", "a.jsonl:3: not valid JSON"),
    "deeply-nested-json": ("a.jsonl", OK + "[" * 100_000, "causal_lm", "a.jsonl:2: not valid JSON"),
    "not-an-object": ("a.jsonl", OK + '["text"]', "causal_lm", "a.jsonl:2: not a JSON object"),
    "missing-field": ("a.jsonl", OK + '{"prompt": "a"}', "causal_lm", "a.jsonl:2: a row with prompt cannot be used"),
    "missing-label": (
        "a.jsonl",
        OK,
        "seq_cls",
        'a.jsonl:1: a row with text cannot be used; it needs "text" and "label"',
    ),
    "two-kinds-in-a-row": (
        "a.jsonl",
        '{"text": "a", "prompt": "b", "completion": "c"}',
        "causal_lm",
        "a.jsonl:1: .* is ambiguous",
    ),
    "mixed-kinds": (
        "a.jsonl",
        OK + '{"prompt": "a", "completion": "b"}',
        "causal_lm",
        "a.jsonl:2: a completion row after text rows",
    ),
    "text-is-a-number": ("a.jsonl", OK + '{"text": 3}', "causal_lm", 'a.jsonl:2: "text" is a int; it must be a string'),
    "text-is-blank": ("a.jsonl", OK + '{"text": " "}', "causal_lm", 'a.jsonl:2: "text" is empty'),
    "half-a-surrogate": (
        "a.jsonl",
        OK + '{"text": "\\ud800"}',
        "causal_lm",
        'a.jsonl:2: "text" has half of a surrogate',
    ),
    "label-is-a-fraction": ("a.jsonl", '{"text": "a", "label": 0.5}', "seq_cls", 'a.jsonl:1: "label" is 0.5'),
    "label-is-a-bool": ("a.jsonl", '{"text": "a", "label": true}', "seq_cls", 'a.jsonl:1: "label" is True'),
    "label-is-empty": ("a.csv", "text,label\na,x\nb,\n", "seq_cls", "a.csv:3: \"label\" is ''"),
    "messages-no-list": ("a.jsonl", '{"messages": "Hi"}', "causal_lm", 'a.jsonl:1: "messages" must be a list'),
    "unknown-role": (
        "a.jsonl",
        CHAT + '\n{"messages": [{"role": "bot", "content": "a"}]}',
        "causal_lm",
        "a.jsonl:2: message 1 needs a role",
    ),
    "no-content": ("a.jsonl", '{"messages": [{"role": "user"}]}', "causal_lm", "a.jsonl:1: the content of message 1"),
    "nobody-answers": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}',
        "causal_lm",
        "a.jsonl:1: no message has the role assistant",
    ),
    "csv-field-too-many": ("a.csv", "text,label\na,b\na,b,c\n", "seq_cls", "a.csv:3: 3 fields where the header has 2"),
    "csv-field-too-few": ("a.csv", "text,label\na\n", "seq_cls", "a.csv:2: 1 fields where the header has 2"),
    "csv-empty-line": ("a.csv", "text,label\na,b\n\nc,d\n", "seq_cls", "a.csv:3: empty line"),
    "csv-open-quote": ("a.csv", 'text,label\na,b\n"c,d\n', "seq_cls", "a.csv:3: not valid CSV"),
    "csv-line-of-a-long-record": ("a.csv", 'text,label\n"a\na",b\n,d\n', "seq_cls", 'a.csv:4: "text" is empty'),
    "csv-column-twice": ("a.csv", "text,text\na,b\n", "causal_lm", "a.csv:1: a column name is given twice"),
}


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(file)


@pytest.mark.parametrize(("name", "content", "task", "kind", "fields"), GOOD.values(), ids=GOOD)
def test_reads(tmp_path, name, content, task, kind, fields) -> None:
    rows = read_rows(write(tmp_path, name, content), task)
    assert rows.kind == kind
    assert [row.fields for row in rows.rows] == fields


@pytest.mark.parametrize(("name", "content", "task", "message"), BAD.values(), ids=BAD)
def test_refuses_by_line_number(tmp_path, name, content, task, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_rows(write(tmp_path, name, content), task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.txt", "no such file$"),
        ("nothing.csv", "no such file$"),
        (".", "is a folder"),
        ("someone/dataset", "no such file; .* pip install datasets"),
    ],
)
def test_says_what_is_not_there(source, message, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=message):
        read_rows(source, "causal_lm")


def test_reads_a_hub_data_set_where_the_package_is_there(monkeypatch) -> None:
    rows = [{"text": "a"}, {"text": 3}]
    fake = SimpleNamespace(load_dataset=lambda name, split: rows if (name, split) == ("someone/set", "train") else None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError, match='someone/set row 2: "text" is a int'):
        read_rows("someone/set", "causal_lm")
    rows.pop()
    assert read_rows("someone/set", "causal_lm").rows == [Row("someone/set row 1", {"text": "a"})]


def test_holds_out_the_contiguous_end_of_one_text() -> None:
    text = " ".join(str(number) for number in range(1000))
    train, held_out = Rows("x", "text", [Row("x:1", {"text": text})]).held_out(0.2)
    head, tail = train.rows[0].fields["text"], held_out.rows[0].fields["text"]
    assert head + tail == text
    assert tail[0] == " "
    assert abs(len(tail) / len(text) - 0.2) < 0.01


def test_holds_out_rows_of_every_class_of_a_sorted_file(reviews) -> None:
    rows = read_rows(str(reviews), "seq_cls")
    train, held_out = rows.held_out(0.3)
    assert len(held_out.rows) == 18
    assert {row.fields["label"] for row in held_out.rows} == {"good", "bad"}
    assert sorted(row.where for row in train.rows + held_out.rows) == sorted(row.where for row in rows.rows)


def test_refuses_to_hold_out_what_is_too_short() -> None:
    with pytest.raises(UserError, match="too short to hold out"):
        Rows("x", "text", [Row("x:1", {"text": "word"})]).held_out(0.5)
