"""python -m bench.predict: what forward and backward would take on an H100, by a model; nothing is measured.

From files of the other instruments, of the same kernels: `bench.ptx --counters-alone --rows 1 70` (cycles of one
program by phase), `bench.resources` (programs on a multiprocessor) and `bench.traffic` (bytes that DRAM moves). Of a
launch, programs run in rounds of as many as the multiprocessors hold; each takes its cycles outside of the loop over
blocks of rows once and those of the loop for every block; DRAM takes its bytes meanwhile, and what one program does
alone comes on top. A range is from the best order of every basic block, as ptxas may find, to PTX's order. The floor is
the compulsory bytes at the bandwidth of a copy. Starting a launch is in neither, and there is
no dropout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bench.architectures import ARCHITECTURES
from bench.classes import add_class_options, chosen
from bench.launches import would_launch
from bench.output import add_output_options, emit
from bench.report import RESULTS, predicted
from bench.traffic import ARCH, MULTIPROCESSORS
from loretta_kernels._triton.plan import FEW_ROWS
from loretta_kernels.selfcheck import Case

ROWS = (1, 16, 256, 2048, 8192, 16384)
FEW, MANY = 1, 70  # rows whose counters there are: where programs share the features of a block, and where not
GHZ, TB_PER_S = 1.71, 3.0  # of an H100 under load, and of a copy on it
BLOCKS = "for block"


@dataclass(frozen=True)
class Launched:
    """What one program of a launch takes, in cycles in the best order and in PTX's.

    Args:
        once, block, alone: outside of the loop over blocks; in it, for a block; by one program for all.
    """

    once: tuple[float, float]
    block: tuple[float, float]
    alone: tuple[float, float]

    def microseconds(self, rounds: int, blocks: int) -> tuple[float, float]:
        """Of so many rounds of programs that take so many blocks each, without what one does alone."""
        best, worst = (
            rounds * (once + blocks * block) / GHZ / 1e3 for once, block in zip(self.once, self.block, strict=True)
        )
        return best, worst


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one direction of a class; `low` to `high`."""

    case: str
    direction: str
    rows: int
    low: float
    high: float
    floor: float


def launched(phases: Sequence[dict[str, Any]], rows: int, block: int) -> Launched:
    """One launch of so many rows, `block` of them at a time, from its phases."""
    programs = max(phase["programs"] for phase in phases)
    blocks = -(-rows // block) / programs if rows > block else 1  # those of few rows share the features of one
    sums = {"once": [0.0, 0.0], "block": [0.0, 0.0], "alone": [0.0, 0.0]}
    for phase in phases:
        in_loop, alone = phase["phase"].startswith(BLOCKS), phase["programs"] == 1 < programs
        of = sums["block" if in_loop else "alone" if alone else "once"]
        of[0] += phase["reordered"] / (blocks if in_loop else 1)
        of[1] += phase["cycles"] / (blocks if in_loop else 1)
    return Launched(*(tuple(sums[name]) for name in ("once", "block", "alone")))  # type: ignore[arg-type]


def predict(case: Case, counters: Any, resident: Any, ratios: Any, rows: Sequence[int] = ROWS) -> list[Prediction]:
    """Both directions of a class.

    Args:
        counters: the phases by (class, rows, kernel).
        resident: programs on a multiprocessor by (class, rows, kernel); one where a kernel is not there.
        ratios: DRAM's bytes over the compulsory ones by (class, direction).
    """
    found = []
    for N in rows:
        compulsory = case.compulsory_bytes(N, 2)
        directions = would_launch(case, N, torch.bfloat16, ARCH, dropout=False).items()
        for (direction, launches), bytes_needed in zip(directions, compulsory, strict=True):
            floor = bytes_needed / TB_PER_S / 1e6
            low = high = 0.0
            for launch in launches:
                kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                # Few rows go forward by four warps, and are counted with one row.
                few = N <= FEW_ROWS or (kernel == "one_pass_forward" and launch.options()["num_warps"] == 4)
                key = case.name, FEW if few else MANY, kernel
                cost = launched(counters[key], key[1], launch.constants["BLOCK_N"])
                rounds = -(-prod(launch.grid) // (MULTIPROCESSORS * resident.get(key, 1)))
                blocks = -(-N // (launch.constants["BLOCK_N"] * launch.grid[0]))
                moved = floor * ratios[case.name, direction]
                for index, time in enumerate(cost.microseconds(rounds, blocks)):
                    time = max(time, moved) + cost.alone[index] / GHZ / 1e3
                    low, high = (low + time, high) if index == 0 else (low, high + time)
            found.append(Prediction(case.name, direction, N, low, high, floor))
    return found


def read(results: Path) -> tuple[Any, Any, Any]:
    """The three tables that `predict` takes, from the files of the instruments.

    Raises:
        FileNotFoundError: a file is not there.
    """
    counters: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for phase in json.loads((results / "ptx" / f"bf16-{ARCH}.json").read_text())["counters"]:
        if "phase" in phase:
            kernel = phase["launch"].strip("_").removesuffix("_kernel")
            counters[phase["case"], phase["rows"], kernel].append(phase)
    resident = {}
    warps = ARCHITECTURES[ARCH].warps
    for row in json.loads((results / "compile" / f"bf16-{ARCH}.json").read_text())["rows"]:
        programs = max(1, round(row["occupancy"] * warps / row["num_warps"]))
        rows = FEW if row["rows"] == 1 else MANY
        resident[row["case"], rows, row["kernel"]] = programs
        resident.setdefault((row["case"], FEW, row["kernel"]), programs)  # the same kernel serves both
    traffic = json.loads((results / "traffic" / f"bf16-{ARCH}.json").read_text())["rows"]
    ratios = {(row["case"], row["direction"]): row["ratio"] for row in traffic}
    return counters, resident, ratios


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the files are (default: bench/results)")
    add_class_options(parser)
    add_output_options(parser)
    args = parser.parse_args(argv)
    try:
        tables = read(args.results)
    except FileNotFoundError as error:
        print(f"{error.filename} is missing: see `python -m bench.predict --help`", file=sys.stderr)
        return 2
    predictions = [asdict(each) for case in chosen(args) for each in predict(case, *tables)]
    emit(args, "bench.predict", argv, {"predictions": predictions}, predicted(predictions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
