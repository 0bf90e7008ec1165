"""The phases of a kernel: its own statements, each loop and what lies between, by the source line of an instruction."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"([\w.]+\.py):(\d+):\d+")
_LIBRARY = ("tl", "triton")


def phases_of(kernel: Any) -> Callable[[str], str | None]:
    """The phase of a source location, `file.py:line:column @[ file.py:line:column ... ]` from the inside out.

    A loop is a phase, and so is each loop in it; outside of loops, so is a call of a device function that stands alone,
    and what lies between.
    """
    function = getattr(kernel, "fn", kernel)
    lines, start = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    file = Path(inspect.getsourcefile(function) or "").name
    by_line: dict[int, str] = {}
    _name(tree.body, "", start - 1, by_line)  # type: ignore[attr-defined]

    def phase_of(loc: str) -> str | None:
        places = _PLACE.findall(loc)
        return by_line.get(int(places[-1][1])) if places and places[-1][0] == file else None

    return phase_of


def _name(body: list[ast.stmt], loop: str, offset: int, by_line: dict[int, str]) -> None:
    """Name the lines of statements, which are in a loop or in none."""
    run = ""  # of statements outside of loops, by its first line
    for statement in body:
        first = statement.lineno + offset
        if isinstance(statement, ast.For | ast.While):
            head = statement.target if isinstance(statement, ast.For) else statement.test
            name = f"{loop}{' / ' if loop else ''}for {ast.unparse(head)}:{first}"
            run = ""
        elif loop:
            name = loop
        elif called := _called(statement):
            name, run = f"{called}:{first}", ""
        else:
            name = run = run or f"from {first}"
        for line in range(first, (statement.end_lineno or statement.lineno) + offset + 1):
            by_line[line] = name
        if isinstance(statement, ast.For | ast.While):
            _name(statement.body, name, offset, by_line)
        elif isinstance(statement, ast.If):
            run = ""
            _name(statement.body, loop, offset, by_line)
            _name(statement.orelse, loop, offset, by_line)


def _called(statement: ast.stmt) -> str:
    """The device function that a statement calls and does nothing else, or ""."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call):
        return ""
    name = ast.unparse(call.func)
    return "" if name.split(".")[0] in _LIBRARY else name.split(".")[-1]
