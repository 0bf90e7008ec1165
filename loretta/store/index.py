"""The index of a store, and the file of rows that it speaks of."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX = "index.json"
FORMAT = 1


class Damaged(ValueError):
    """The numbers of an adapter are not those that were added."""


@dataclass(frozen=True)
class Index:
    """What index.json holds.

    Attributes:
        config: of PEFT, that all adapters share, with the base model's name.
        source: of the base: its GGUF file, and the dtype and the quantisation with which the first adapter was trained.
        dtype: of all numbers.
        tensors: the shape of each tensor of an adapter by its name in PEFT's files, in the order of a row.
        data: the file of rows.
        rows: how many rows of that file are written; what is behind them was left by a process that died.
        row_of, checksums: by name; two dicts of numbers, since ten thousand pairs would set off Python's garbage
            collector, which takes longer than all else.
    """

    config: dict[str, Any]
    source: dict[str, Any]
    dtype: str
    tensors: dict[str, list[int]]
    data: str = "rows-0.bin"
    rows: int = 0
    row_of: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT


def read_index(file: Path) -> Index:
    """The index in a file.

    Raises:
        ValueError: it is damaged, or of a later version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version of loretta reads {FORMAT}")
        return Index(**content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as the index of an adapter store: {error}") from error


def mapped(file: Path) -> mmap.mmap | bytes:
    """The bytes of a file, mapped; no bytes where it is empty or missing, so that every row reads as damaged."""
    try:
        with open(file, "rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):
        return b""
