"""python -m bench.traffic: the bytes that the kernels move, counted in Triton's interpreter; needs no GPU.

Forward and backward run for a few blocks of rows, and for one more. What grows is the traffic of a row; the rest
is paid once, by the last program of the backward. The ratio is that of 8192 rows to the compulsory bytes: forward
reads x (and a residual that is not x) and writes y, backward reads dy and x and writes dx.

Exit code 1 when a gate fails: one launch forward and one backward, and for the class adp 4096x64x5 at most 1.6 times
the compulsory bytes forward and 1.5 backward, in bf16. `counting.py` says what counts.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.classes import add_class_options, chosen
from bench.counting import Counter, counting
from bench.launches import launched, would_launch
from bench.output import add_output_options, emit
from loretta_kernels.selfcheck import Case, text_table

ROWS = 8192
DTYPE = torch.bfloat16
GATED = "adp 4096x64x5"
GATES = {"forward": 1.6, "backward": 1.5}
L1_BYTES = 128 * 1024  # half of an H100 multiprocessor's: two programs share it


@dataclass(frozen=True)
class Traffic:
    """What one direction of a class moves, in bytes.

    Args:
        measured: the two numbers of rows that ran.
        per_row, once: so that N rows move `N · per_row + once`.
        compulsory: of a row.
        by_tensor: what each access to each tensor adds to `per_row`.
        from_l1: loads of what is not rows, as issued, of a row: not in `per_row`, which has them once for a program.
        resident: what a program loads of what is not rows, trusted to stay in L1.
    """

    case: str
    direction: str
    launches: int
    measured: tuple[int, int]
    per_row: float
    once: float
    compulsory: int
    by_tensor: dict[str, float]
    from_l1: float
    resident: int

    @property
    def total(self) -> float:
        """Bytes that `ROWS` rows move."""
        return ROWS * self.per_row + self.once

    @property
    def ratio(self) -> float:
        """Bytes over the compulsory ones, for `ROWS` rows."""
        return self.total / (ROWS * self.compulsory)

    def microseconds(self, bandwidth: float) -> float:
        """The time of `ROWS` rows where memory is all that counts, at so many GB/s."""
        return self.total / bandwidth / 1000

    def failures(self) -> list[str]:
        """The gates that it fails."""
        failures = []
        if self.launches != 1:
            failures.append(f"{self.launches} launches")
        if self.case == GATED and self.ratio > GATES[self.direction]:
            failures.append(f"moves {self.ratio:.3f} times the compulsory bytes, {GATES[self.direction]} are allowed")
        return failures


def measure(case: Case) -> list[Traffic]:
    """Run the class for two sizes, and compare."""
    sizes = _sizes(case)
    small, large = (_count(case, N) for N in sizes)
    return [
        compare(case, direction, sizes, small[direction], large[direction], compulsory)
        for direction, compulsory in zip(GATES, case.compulsory_bytes(1, DTYPE.itemsize), strict=True)
    ]


def _sizes(case: Case) -> tuple[int, int]:
    """Two numbers of rows, of few blocks, for which the kernels of `ROWS` rows run, a program for each block."""
    expected = _forms(case, ROWS)
    block = max(rows for _, _, rows in expected)
    few = 2 * block
    while _forms(case, few) != expected or _forms(case, few + block) != expected:
        few += block
        if few > ROWS:
            raise RuntimeError(f"{case.name}: no smaller size runs what {ROWS} rows run, {expected}")
    return few, few + block


def _forms(case: Case, N: int) -> list[tuple[Any, Any, int]]:
    """Of every launch for N rows the kernel and constants, how many programs share a block, and rows of a program."""
    forward, backward = would_launch(case, N, DTYPE, "sm_90").values()
    return [
        ((launch.kernel, launch.constants), launch.grid[1:], -(-N // launch.grid[0]))
        for launch in (*forward, *backward)
    ]


def _count(case: Case, N: int) -> dict[str, list[Counter]]:
    """A counter for each launch of forward and of backward, for N rows."""
    with counting() as counters:
        launches = launched(case, N, DTYPE)
    cut = len(launches["forward"])
    return {"forward": counters[:cut], "backward": counters[cut:]}


def compare(
    case: Case, direction: str, sizes: tuple[int, int], small: list[Counter], large: list[Counter], compulsory: int
) -> Traffic:
    """The traffic that grows with the rows, and what is left, from a counter for each launch for either size."""
    few, growth = sizes[0], sizes[1] - sizes[0]
    of_small, of_large = _bytes(small), _bytes(large)
    by_tensor = {access: (moved - of_small.get(access, 0)) / growth for access, moved in of_large.items()}
    per_row = sum(by_tensor.values())
    from_l1 = sum(counter.from_l1 for counter in large) - sum(counter.from_l1 for counter in small)
    return Traffic(
        case.name,
        direction,
        len(large),
        sizes,
        per_row,
        sum(of_small.values()) - few * per_row,
        compulsory,
        dict(sorted(by_tensor.items(), key=lambda item: -item[1])),
        from_l1 / growth,
        max(counter.resident for counter in large),
    )


def _bytes(counters: list[Counter]) -> dict[str, int]:
    """Bytes by access and tensor, of all launches of a direction."""
    total: dict[str, int] = {}
    for counter in counters:
        for (action, name), moved in counter.bytes.items():
            access = f"{action} {name.removesuffix('_ptr')}"
            total[access] = total.get(access, 0) + moved
    return total


def main(argv: Sequence[str] | None = None, measure: Callable[[Case], list[Traffic]] = measure) -> int:
    """Print the table; 1 where a gate fails."""
    args = _parser().parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, below
    found = [row for case in chosen(args) for row in measure(case)]
    failures = [f"{row.case} {row.direction}: {what}" for row in found for what in row.failures()]
    notes = [f"bf16; ratio and us are of {ROWS} rows, us at {args.bandwidth:g} GB/s; bytes are of a row"]
    if large := [row for row in found if row.resident > L1_BYTES]:
        notes.append(f"more than {L1_BYTES // 1024} KB to keep in L1, so that some of `from L1` will come from L2:")
        notes += [f"  {row.case} {row.direction}: {row.resident // 1024} KB" for row in large]
    text = "\n".join([_table(found, args.bandwidth), "", *notes, *failures, f"{len(failures)} gates failed"])
    rows = [asdict(row) | {"ratio": row.ratio, "microseconds": row.microseconds(args.bandwidth)} for row in found]
    emit(args, "bench.traffic", argv, {"rows": rows, "failures": failures}, text)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=3350.0, metavar="GB/s", help="default: an H100's, 3350")
    add_class_options(parser)
    add_output_options(parser)
    return parser


def _table(rows: list[Traffic], bandwidth: float) -> str:
    """One line for each direction of each class."""
    header = (
        "class",
        "direction",
        "launches",
        "rows",
        "bytes",
        "compulsory",
        "ratio",
        "once",
        "from L1",
        "KB in L1",
        "us",
    )
    return text_table(
        header,
        [
            (
                row.case,
                row.direction,
                row.launches,
                "{}, {}".format(*row.measured),
                f"{row.per_row:.0f}",
                row.compulsory,
                f"{row.ratio:.3f}",
                f"{row.once:.0f}",
                f"{row.from_l1:.0f}",
                row.resident // 1024,
                f"{row.microseconds(bandwidth):.1f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
