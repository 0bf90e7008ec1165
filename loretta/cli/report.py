"""Where words go: progress to stderr, the result to stdout."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def say(line: str) -> None:
    """One line of progress, said by one process only."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def show(result: dict[str, Any], lines: Sequence[Sequence[str]], as_json: bool) -> None:
    """The result: one JSON object, or lines of name and values in columns, values on the right where they are more."""
    if as_json:
        print(json.dumps(result))
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for name, *values in lines:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        print("  ".join([f"{name:<{widths[0]}}", *(cells if len(cells) > 1 else values)]))


def shown_scores(scores: dict[str, float]) -> dict[str, str]:
    """Every score but the loss, with always the same digits."""
    return {
        name: f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"
        for name, value in scores.items()
        if name != "loss"
    }


def shown_bytes(count: int) -> str:
    """A file size in kB or MB of 1000."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
