"""python -m bench.traffic: the bytes that DRAM moves for the kernels, counted on their compiled PTX; needs no GPU.

Forward and backward of 8192 rows are executed (`bench.ptx`) with all programs of a wave side by side, as many as 132
multiprocessors hold by their shared memory and warps. L2 keeps what was touched last: a sector of 32 bytes that is
touched again is free where less than 16 MB were touched in between by all programs; a third of an H100's L2, whose two
halves keep copies of each other's lines. Stores reach DRAM when they are displaced, or at the end.

The ratio is to the compulsory bytes: forward reads x (and a residual that is not x) and writes y, backward reads dy and
x and writes dx. Exit code 1 when a gate fails: one launch forward and one backward, and for adapters of rank up to 8 at
most 1.05 times the compulsory bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.architectures import ARCHITECTURES
from bench.classes import add_class_options, chosen
from bench.output import add_output_options, emit
from bench.ptx import Executed, Executor, executing
from loretta_kernels import backend
from loretta_kernels.selfcheck import Case, text_table

ROWS = 8192
ARCH = "sm_90"
DTYPE = torch.bfloat16
MULTIPROCESSORS = 132
L2_BYTES = 16 * 2**20
GATE, GATED_RANK = 1.05, 8
SECTOR = 32


@dataclass(frozen=True)
class Traffic:
    """What one direction of a class moves.

    Args:
        rows: that ran.
        moved, compulsory: bytes of all rows.
        by_tensor: bytes that DRAM reads and writes, by argument.
        issued: bytes of all accesses, as they leave the warps.
    """

    case: str
    direction: str
    gated: bool
    launches: int
    rows: int
    moved: int
    compulsory: int
    by_tensor: dict[str, dict[str, int]]
    issued: int

    @property
    def ratio(self) -> float:
        """Bytes over the compulsory ones."""
        return self.moved / self.compulsory

    def microseconds(self, bandwidth: float) -> float:
        """The time where memory is all that counts, at so many GB/s."""
        return self.moved / bandwidth / 1000

    def failures(self) -> list[str]:
        """The gates that it fails."""
        failures = []
        if self.launches != 1:
            failures.append(f"{self.launches} launches")
        if self.gated and self.ratio > GATE:
            failures.append(f"moves {self.ratio:.3f} times the compulsory bytes, {GATE} are allowed")
        return failures


class Waves(Executor):
    """Executes all programs of a wave side by side, and counts what DRAM sees of `bytes_of_l2`."""

    def __init__(self, arch: str = ARCH, bytes_of_l2: int = L2_BYTES) -> None:
        super().__init__(arch, adversarial=False, checks=False, dram=bytes_of_l2)

    def resident(self, shared: int, warps: int) -> int:
        """As many as the multiprocessors hold by shared memory and warps; registers may allow fewer."""
        architecture = ARCHITECTURES[self.arch]
        return MULTIPROCESSORS * max(1, round(architecture.occupancy(1, shared, warps) * architecture.warps / warps))


def measure(case: Case, rows: int = ROWS) -> list[Traffic]:
    """Execute the class forward and backward, without dropout and with a fixed scale."""
    problem = case.training_problem(rows, DTYPE)
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items() if name != "residual"}
    with executing(executor=Waves()) as executor, backend("triton"):
        y = problem.with_tensors(leaves).run()
        forward = len(executor.launches)
        torch.autograd.grad(y, list(leaves.values()), problem.dy)
    gated = case.operator == "tt_adapter" and case.rank <= GATED_RANK
    return [
        of_launches(case.name, direction, gated, launches, rows, compulsory)
        for direction, launches, compulsory in zip(
            ("forward", "backward"),
            (executor.launches[:forward], executor.launches[forward:]),
            case.compulsory_bytes(rows, DTYPE.itemsize),
            strict=True,
        )
    ]


def of_launches(
    case: str, direction: str, gated: bool, launches: Sequence[Executed], rows: int, compulsory: int
) -> Traffic:
    """The traffic of one direction's launches."""
    by_tensor: dict[str, dict[str, int]] = {}
    moved = issued = 0
    for launch in launches:
        for name, counts in launch.traffic.items():
            read, written = counts["dram_read"] * SECTOR, counts["dram_written"] * SECTOR
            known = by_tensor.setdefault(name, {"read": 0, "written": 0})
            known["read"] += read
            known["written"] += written
            moved += read + written
            issued += SECTOR * sum(counts[action] for action in ("read", "written", "reduced", "copied"))
    largest = dict(sorted(by_tensor.items(), key=lambda item: -sum(item[1].values())))
    return Traffic(case, direction, gated, len(launches), rows, moved, compulsory, largest, issued)


def main(argv: Sequence[str] | None = None, measure: Callable[..., list[Traffic]] = measure) -> int:
    """Print the table; 1 where a gate fails."""
    args = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.traffic compiles: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    found = [row for case in chosen(args) for row in measure(case, args.rows)]
    failures = [f"{row.case} {row.direction}: {what}" for row in found for what in row.failures()]
    notes = [f"bf16, {args.rows} rows; us at {args.bandwidth:g} GB/s; issued: bytes as they leave the warps"]
    text = "\n".join([_table(found, args.bandwidth), "", *notes, *failures, f"{len(failures)} gates failed"])
    rows = [asdict(row) | {"ratio": row.ratio, "microseconds": row.microseconds(args.bandwidth)} for row in found]
    emit(args, "bench.traffic", argv, {"rows": rows, "failures": failures}, text)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=3350.0, metavar="GB/s", help="default: an H100's, 3350")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"default {ROWS}")
    add_class_options(parser)
    add_output_options(parser)
    return parser


def _table(rows: list[Traffic], bandwidth: float) -> str:
    """One line for each direction of each class."""
    header = "class", "direction", "launches", "MB", "compulsory", "ratio", "issued", "us", "most of it"
    return text_table(
        header,
        [
            (
                row.case,
                row.direction,
                row.launches,
                f"{row.moved / 1e6:.1f}",
                f"{row.compulsory / 1e6:.1f}",
                f"{row.ratio:.3f}",
                f"{row.issued / 1e6:.1f}",
                f"{row.microseconds(bandwidth):.1f}",
                ", ".join(_share(name, counts) for name, counts in list(row.by_tensor.items())[:4]),
            )
            for row in rows
        ],
    )


def _share(name: str, counts: dict[str, int]) -> str:
    """What DRAM reads and writes of one argument."""
    parts = [f"{action} {size / 1e6:.1f}" for action, size in counts.items() if size]
    return f"{name.replace('_ptr', '')} {' '.join(parts) or '0'}"


if __name__ == "__main__":
    sys.exit(main())
