"""The results as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from loretta_kernels.selfcheck.judge import Row
from loretta_kernels.selfcheck.timing import Timing


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns side by side: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def report(rows: Sequence[Row], timings: Sequence[Timing] = (), every: bool = False) -> str:
    """A table of errors, of the worst answer of each case and dtype or of `every` one, then times and misses."""
    shown = (
        rows if every else [max(group, key=_nearness) for _, group in groupby(rows, lambda row: (row.case, row.dtype))]
    )
    errors = text_table(
        ("case", "operator", "rows", "dtype", "answer" if every else "worst answer", "error", "bar"),
        [(row.case, row.operator, row.N, row.dtype, row.answer, f"{row.error:.1e}", f"{row.bar:.1e}") for row in shown],
    )
    times = text_table(
        ("case", "direction", "us", "us of a copy", "ratio"),
        [(t.case, t.direction, f"{t.microseconds:.1f}", f"{t.copy:.1f}", f"{t.ratio:.2f}") for t in timings],
    )
    missed = [row.text for row in rows if row.missed]
    verdict = f"{len(rows)} outputs and gradients, {len(missed)} above the bar"
    return "\n\n".join([errors, *([times] if timings else []), "\n".join([*missed, verdict])])


def _nearness(row: Row) -> float:
    """An error over its bar; infinite for NaN, and for any error where none is allowed."""
    if row.missed and (row.error != row.error or not row.bar):
        return float("inf")
    return row.error / row.bar if row.bar else 0.0
