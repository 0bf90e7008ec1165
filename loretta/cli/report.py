"""Where words go: progress to stderr, the result to stdout."""

import json
import os
import sys
from typing import Any


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def say(line: str) -> None:
    """One line of progress, said by one process only."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def show(result: dict[str, Any], lines: list[tuple[str, str]], as_json: bool) -> None:
    """The result: one JSON object, or aligned lines of name and value."""
    if as_json:
        print(json.dumps(result))
        return
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def shown_metric(name: str, value: float) -> str:
    """A perplexity or an accuracy, always with the same digits."""
    return f"{value:.4f}" if name == "perplexity" else f"{100 * value:.2f} %"


def shown_bytes(count: int) -> str:
    """A file size in kB or MB of 1000."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
