"""What the command line prints: errors in one line and progress on stderr, results on stdout."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


class UserError(Exception):
    """Something the user gave cannot be used; printed as one line, with exit code 2."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, its name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def refusing(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of some kinds into a UserError with the problem and the error's message, on one line."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{problem}: {one_line(error)[:600]}") from error


def need(package: str, what: str, extra: str) -> None:
    """Raise a UserError unless the package is installed, before it is imported."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}: pip install 'loretta-tt[{extra}]'")


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def log(line: str) -> None:
    """Print a line of progress, in the main process only."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the result as one JSON object, or the text for people."""
    print(json.dumps(result) if as_json else text)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of a name and values in columns; several values are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    formatted = []
    for name, *values in lines:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        formatted.append("  ".join([f"{name:<{widths[0]}}", *(cells if len(cells) > 1 else values)]))
    return "\n".join(formatted)


def score_texts(scores: dict[str, float]) -> dict[str, str]:
    """Every score but the loss, with a fixed number of digits."""
    return {
        name: f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"
        for name, value in scores.items()
        if name != "loss"
    }


def size_text(count: int, kilo: int = 1000) -> str:
    """A number of bytes in kB, MB or GB (multiples of 1000), or in KiB, MiB or GiB (of 1024)."""
    power = 3 if count >= kilo**3 else 2 if count >= kilo**2 else 1
    unit = ("kB", "MB", "GB")[power - 1] if kilo == 1000 else ("KiB", "MiB", "GiB")[power - 1]
    return f"{count / kilo**power:,.{1 if power == 1 else 2}f} {unit}"
