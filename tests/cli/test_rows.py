"""Every format is read as documented, and every malformed line is refused by its number."""

import gzip
import json
import sys
from pathlib import Path

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from loretta.cli.report import UserError
from loretta.cli.rows import Row, Rows, read_rows
from tests.cli import fuzz

CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'

AB = [{"text": "a"}, {"text": "b"}]
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
    "jsonl-label": ("a.jsonl", '{"text": "a", "label": 1}', "seq_cls", "label", [{"text": "a", "label": "1"}]),
    "label-unused-by-a-language-model": ("a.jsonl", '{"text": "a", "label": 1}', "causal_lm", "text", [{"text": "a"}]),
    "csv-completion": (
        "a.csv",
        "completion,prompt\nc,p\n",
        "causal_lm",
        "completion",
        [{"prompt": "p", "completion": "c"}],
    ),
    "csv-quotes": ("a.csv", 'text,label\n"a, ""b""\nc",x\n', "seq_cls", "label", [{"text": 'a, "b"\nc', "label": "x"}]),
    "label-that-is-true-or-false": (
        "a.jsonl",
        '{"text": "a", "label": true}\n{"text": "b", "label": false}',
        "seq_cls",
        "label",
        [{"text": "a", "label": "true"}, {"text": "b", "label": "false"}],
    ),
    "label-with-blanks-around-it": (
        "a.csv",
        "text,label\na,pos\nb,pos \n",
        "seq_cls",
        "label",
        [{"text": "a", "label": "pos"}, {"text": "b", "label": "pos"}],
    ),
    "label-that-is-a-whole-number-with-a-point": (
        "a.jsonl",
        '{"text": "a", "label": 2.0}',
        "seq_cls",
        "label",
        [{"text": "a", "label": "2"}],
    ),
    "two-texts": (
        "a.csv",
        "text_pair,text,label\nq,p,x\n",
        "seq_cls",
        "pair",
        [{"text": "p", "text_pair": "q", "label": "x"}],
    ),
    "json-array": (
        "a.json",
        '[\n {"text": "a"},\n {"text": "b"}\n]\n',
        "causal_lm",
        "text",
        [{"text": "a"}, {"text": "b"}],
    ),
    "json-with-an-object-a-line": (
        "a.json",
        '{"text": "a"}\n{"text": "b"}',
        "causal_lm",
        "text",
        [{"text": "a"}, {"text": "b"}],
    ),
    "suffix-in-capitals": ("A.CSV", "text\na\n", "causal_lm", "text", [{"text": "a"}]),
    "gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}'), "causal_lm", "text", [{"text": "a"}]),
    "tabs": ("a.tsv", "text\tlabel\na, b\tx\n", "seq_cls", "label", [{"text": "a, b", "label": "x"}]),
    "semicolons": ("a.csv", 'text;label\n"a; b, c";x\n', "seq_cls", "label", [{"text": "a; b, c", "label": "x"}]),
    "alpaca": (
        "a.json",
        '[{"instruction": "Add {}.", "input": "2, 3", "output": "5", "text": "all of it"}]',
        "causal_lm",
        "completion",
        [
            {
                "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {}.\n\n"
                "### Input:\n2, 3\n\n### Response:\n",
                "completion": "5",
            }
        ],
    ),
    "alpaca-without-input": (
        "a.jsonl",
        '{"instruction": "Hi", "input": "", "output": "Hello"}',
        "causal_lm",
        "completion",
        [
            {
                "prompt": "Below is an instruction that describes a task. Write a response that appropriately "
                "completes the request.\n\n### Instruction:\nHi\n\n### Response:\n",
                "completion": "Hello",
            }
        ],
    ),
    "sharegpt": (
        "a.json",
        '[{"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]',
        "causal_lm",
        "chat",
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
    ),
    "csv-windows-line-ends": ("a.csv", "text\r\na\r\nb\r\n\r\n", "causal_lm", "text", [{"text": "a"}, {"text": "b"}]),
}

OK = '{"text": "a"}\n'
BAD = {
    "empty-file": ("a.txt", "", "causal_lm", "a.txt: the file is empty"),
    "blank-file": ("a.jsonl", "\n \n", "causal_lm", "a.jsonl: the file is empty"),
    "header-only": ("a.csv", "text,label\n", "seq_cls", "a.csv: no rows"),
    "unknown-suffix": ("a.xml", "{}", "causal_lm", "a.xml: unknown format '.xml'; accepted: .txt, .jsonl, .json, .csv"),
    "broken-gzip": ("a.txt.gz", gzip.compress(b"text")[:-9], "causal_lm", "a.txt.gz: not valid gzip"),
    "no-gzip": ("a.txt.gz", "text", "causal_lm", "a.txt.gz: not valid gzip"),
    "broken-parquet": ("a.parquet", "text", "causal_lm", "a.parquet: not valid Parquet"),
    "row-of-a-json-array": ("a.json", '[{"text": "a"},\n{"text": 3}]', "causal_lm", 'a.json row 2: "text" is a int'),
    "broken-json-array": ("a.json", '[{"text": "a"}', "causal_lm", "a.json: not valid JSON: .* line 1"),
    "unknown-speaker": (
        "a.jsonl",
        '{"conversations": [{"from": ["gpt"], "value": "Hi"}]}',
        "causal_lm",
        "a.jsonl:1: message 1 needs a role",
    ),
    "instruction-is-a-number": (
        "a.jsonl",
        '{"instruction": 3, "output": "a"}',
        "causal_lm",
        'a.jsonl:1: "instruction" is a int',
    ),
    "two-kinds-of-labelled-rows": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "a", "text_pair": "b", "label": 1}',
        "seq_cls",
        "a.jsonl:2: a pair row after label rows",
    ),
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
    "label-is-infinite": ("a.jsonl", '{"text": "a", "label": Infinity}', "seq_cls", 'a.jsonl:1: "label" is inf'),
    "label-is-a-list": ("a.jsonl", '{"text": "a", "label": [1]}', "seq_cls", r'a.jsonl:1: "label" is \[1\]'),
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
    rows = read_rows([write(tmp_path, name, content)], task)
    assert rows.kind == kind
    assert [row.fields for row in rows.rows] == fields


@pytest.mark.parametrize(("name", "content", "task", "message"), BAD.values(), ids=BAD)
def test_refuses_by_line_number(tmp_path, name, content, task, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_rows([write(tmp_path, name, content)], task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.txt", "no such file$"),
        ("nothing.csv", "no such file$"),
        (".", "is a folder"),
        ("someone/dataset", "no such file; .* pip install .loretta-tt.data"),
    ],
)
def test_says_what_is_not_there(source, message, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=message):
        read_rows([source], "causal_lm")


def test_reads_a_hub_data_set_where_the_package_is_there(monkeypatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Dataset:
        asked.append((name, config, split))
        return Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = [{"text": "a"}]
    assert read_rows(["someone/set"], "causal_lm").rows == [Row("someone/set row 1", {"text": "a"})]
    rows = [{"text": "a"}, {"text": " "}]
    with pytest.raises(UserError, match='someone/set:b:test row 2: "text" is empty'):
        read_rows(["someone/set:b:test"], "causal_lm")
    assert asked == [("someone/set", None, "train"), ("someone/set", "b", "test")]


@pytest.mark.parametrize("parquet", [False, True], ids=["hub", "parquet"])
def test_a_class_of_a_data_set_has_its_name_and_one_that_is_unknown_none(tmp_path, monkeypatch, parquet) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]

    def read() -> list[str]:
        found = Dataset.from_list(rows, features=features)
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: found)
        found.to_parquet(tmp_path / "a.parquet")
        source = str(tmp_path / "a.parquet") if parquet else "someone/set"
        return [row.fields["label"] for row in read_rows([source], "seq_cls").rows]

    assert read() == ["yes", "no"]
    rows.append({"text": "c", "label": -1})
    with pytest.raises(UserError, match="row 3: a row with text, label cannot be used"):
        read()


def test_reads_parquet(tmp_path) -> None:
    table = {"text": ["a", "b"], "label": [True, False], "note": [None, "x"]}
    Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    rows = read_rows([str(tmp_path / "a.parquet")], "seq_cls").rows
    assert [row.where for row in rows] == [f"{tmp_path / 'a.parquet'} row {number}" for number in (1, 2)]
    assert [row.fields for row in rows] == [{"text": "a", "label": "true"}, {"text": "b", "label": "false"}]


def test_parquet_without_the_package_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"a.parquet: needs the package datasets: pip install 'loretta-tt\[data\]'"):
        read_rows([write(tmp_path, "a.parquet", "")], "causal_lm")


TABLE = {"text": ["the cat", "the dog"] * 4, "label": ["x", "y"] * 4}
WHOLE = {
    "a.json": lambda: json.dumps([{"text": "the cat", "label": "x"}] * 4).encode(),
    "b.json": lambda: json.dumps([{"conversations": [{"from": "gpt", "value": "a"}]}] * 4).encode(),
    "a.tsv": lambda: b"text\tlabel\na\tx\n" * 4,
    "a.csv.gz": lambda: gzip.compress(b"text,label\na,x\n" * 4),
    "a.parquet": lambda: pandas.DataFrame(TABLE).to_parquet(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_refused_or_read(tmp_path, name) -> None:
    said = []
    for _, data in fuzz.damaged_bytes(WHOLE[name](), 0, 60):
        for task in ("causal_lm", "seq_cls"):
            try:
                read_rows([write(tmp_path, name, data)], task)
            except UserError as error:
                said.append(str(error))
    assert len(said) > 60
    assert not any("\n" in message for message in said)


def test_reads_several_files_of_one_kind(tmp_path) -> None:
    files = [write(tmp_path, "a.csv", "text\na\n"), write(tmp_path, "b.jsonl", OK * 2)]
    assert [row.fields["text"] for row in read_rows(files, "causal_lm").rows] == ["a", "a", "a"]
    files.append(write(tmp_path, "c.jsonl", '{"prompt": "a", "completion": "b"}'))
    with pytest.raises(UserError, match=r"c\.jsonl:1: a completion row after text rows"):
        read_rows(files, "causal_lm")


def test_reads_a_file_in_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.jsonl", OK)
    assert len(read_rows(["~/a.jsonl"], "causal_lm").rows) == 1


def test_columns_of_other_names(tmp_path) -> None:
    file = write(tmp_path, "a.csv", "sentence1,sentence2,label,text\np,q,x,no\n")
    columns = {"text": "sentence1", "text_pair": "sentence2"}
    assert read_rows([file], "seq_cls", columns).rows[0].fields == {"text": "p", "text_pair": "q", "label": "x"}
    with pytest.raises(UserError, match=r"a.csv:2: no column 'stars' \(--columns\); it has sentence1, sentence2"):
        read_rows([file], "seq_cls", {"label": "stars"})


def test_holds_out_the_contiguous_end_of_one_text() -> None:
    text = " ".join(str(number) for number in range(1000))
    train, held_out = Rows("x", "text", [Row("x:1", {"text": text})]).held_out(0.2)
    head, tail = train.rows[0].fields["text"], held_out.rows[0].fields["text"]
    assert head + tail == text
    assert tail[0] == " "
    assert abs(len(tail) / len(text) - 0.2) < 0.01


def test_holds_out_rows_of_every_class_of_a_sorted_file(reviews) -> None:
    rows = read_rows([str(reviews)], "seq_cls")
    train, held_out = rows.held_out(0.3)
    assert len(held_out.rows) == 18
    assert {row.fields["label"] for row in held_out.rows} == {"good", "bad"}
    assert sorted(row.where for row in train.rows + held_out.rows) == sorted(row.where for row in rows.rows)


def test_one_row_of_every_class_stays_in_training() -> None:
    rows = Rows("x", "label", [Row(f"x:{n}", {"text": "a", "label": str(min(n, 3))}) for n in range(8)])
    train, held_out = rows.held_out(0.5)
    assert {row.fields["label"] for row in train.rows} == {"0", "1", "2", "3"}
    assert {row.fields["label"] for row in held_out.rows} == {"3"}


def test_refuses_to_hold_out_what_is_too_short() -> None:
    with pytest.raises(UserError, match="too short to hold out"):
        Rows("x", "text", [Row("x:1", {"text": "word"})]).held_out(0.5)
