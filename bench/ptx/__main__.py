"""python -m bench.ptx: every operator as compiled PTX, executed on the CPU and judged against its definition in fp64.

A line is a class, an architecture, a dtype and a number of rows, in several schedules: the error of the worst answer
over what is allowed, whether the answers kept their bits over the schedules, and what was found (races, bounds, memory
that nobody wrote, copies and products that nobody waited for). With --counters one more run counts instructions,
sectors, wavefronts, round trips and cycles by phase. Exit code 1 when an answer is above its bar, or something is
found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from bench.classes import add_class_options, chosen
from bench.output import add_output_options, emit
from bench.ptx.counters import Phase, costly_lines, phases
from bench.ptx.executor import Executor, executing
from loretta_kernels import backend
from loretta_kernels.selfcheck import Case, text_table

ARCHITECTURES = ("sm_80", "sm_90")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCHEDULES = 3
Judge = Callable[[Case, int, torch.dtype], list[Any]]


@dataclass(frozen=True)
class Outcome:
    """What one class showed on one architecture, in one dtype, for one number of rows.

    Args:
        launches: of forward and backward.
        instructions: of all warps.
        worst, ratio: the answer with the largest error over what is allowed, and how large that is.
        missed: the answers above what is allowed.
        errors, odd: findings, and those that are no error by themselves.
        same_bits: whether all schedules gave the same bits.
    """

    case: str
    arch: str
    dtype: str
    rows: int
    launches: int = 0
    instructions: int = 0
    worst: str = ""
    ratio: float = 0.0
    same_bits: bool = True
    missed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What makes the command fail."""
        where = f"{self.arch} {self.dtype} {self.case} of {self.rows} rows"
        return [f"{where}: {what}" for what in dict.fromkeys((*self.missed, *self.errors))]


def judged(case: Case, N: int, dtype: torch.dtype) -> list[Any]:
    """A row for every answer, by the judge of the project."""
    from loretta_kernels.selfcheck import judged

    return judged(case.problem(N, dtype), case.name, "triton")


def outcome(case: Case, arch: str, dtype: str, N: int, schedules: int, judge: Judge = judged) -> Outcome:
    """Run a class in several schedules."""
    judgements, executors = [], []
    for seed in range(schedules):
        with executing(arch, seed=seed) as executor, backend("triton"):
            judgements.append(judge(case, N, DTYPES[dtype]))
        executors.append(executor)
    rows = [row for rows in judgements for row in rows]
    worst = max(rows, key=_over)
    return Outcome(
        case.name,
        arch,
        dtype,
        N,
        len(executors[0].launches),
        sum(launch.instructions for launch in executors[0].launches),
        worst.answer,
        _over(worst),
        all([row.error for row in each] == [row.error for row in judgements[0]] for each in judgements),
        [row.text for row in rows if row.missed],
        [str(finding) for executor in executors for finding in executor.errors],
        sorted({finding.what for executor in executors for finding in executor.findings if not finding.is_error}),
    )


def _over(row: Any) -> float:
    """An error over its bar; not a number is beyond every other, and where nothing is allowed so is any error."""
    if row.error != row.error or (row.error and not row.bar):
        return float("inf")
    return row.error / row.bar if row.bar else 0.0


def counted(case: Case, arch: str, dtype: str, N: int) -> Executor:
    """Forward and backward in order and without checks, every cycle counted.

    With two multiprocessors: programs that make their tables once then take several blocks of rows each.
    """
    from loretta_kernels._triton import adapter

    with (
        patch.object(adapter, "multiprocessors", lambda device: 2),
        executing(arch, adversarial=False, checks=False, timing=True) as executor,
        backend("triton"),
    ):
        case.training_problem(N, DTYPES[dtype]).solve()
    return executor


def main(argv: Sequence[str] | None = None, judge: Judge = judged) -> int:
    """Print the table; 1 where something fails."""
    args = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.ptx compiles: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    outcomes, tables, counts = [], [], []
    for case, arch, dtype, N in _work(args):
        if not args.counters_alone:
            outcomes.append(outcome(case, arch, dtype, N, args.schedules, judge))
            print(f"{case.name} {arch} {dtype} {N}: {outcomes[-1].ratio:.2f}", file=sys.stderr)
        if args.counters or args.counters_alone:
            executor = counted(case, arch, dtype, N)
            where = {"case": case.name, "arch": arch, "dtype": dtype, "rows": N}
            for launch in executor.launches:
                of_launch = phases(launch)
                counts += [where | asdict(phase) for phase in of_launch]
                counts.append(where | {"launch": launch.kernel, "grid": launch.grid, "traffic": launch.traffic})
                tables.append(_counters(f"{case.name}, {arch}, {dtype}, {N} rows", launch, of_launch))
    failures = [what for each in outcomes for what in each.failures]
    summary = f"{len(outcomes)} of {args.schedules} schedules each, {len(failures)} failures"
    text = "\n\n".join([*([_table(outcomes)] if outcomes else []), *tables, "\n".join([*failures, summary])])
    found = {"rows": [asdict(each) for each in outcomes], "counters": counts, "failures": failures}
    emit(args, "bench.ptx", argv, found, text)
    return 1 if failures else 0


def _work(args: argparse.Namespace) -> Iterator[tuple[Case, str, str, int]]:
    for case in chosen(args):
        for arch in args.arch:
            for dtype in args.dtype:
                for N in args.rows:
                    yield case, arch, dtype, N


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ptx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 70], metavar="N")
    parser.add_argument("--schedules", type=int, default=SCHEDULES, metavar="N", help=f"default {SCHEDULES}")
    parser.add_argument("--deterministic", action="store_true", help="what torch.use_deterministic_algorithms launches")
    parser.add_argument("--counters", action="store_true", help="count, too")
    parser.add_argument("--counters-alone", action="store_true", help="count, and judge nothing")
    add_class_options(parser)
    add_output_options(parser)
    return parser


def _table(outcomes: list[Outcome]) -> str:
    header = "class", "arch", "dtype", "rows", "launches", "M instr", "worst", "error/bar", "same bits", "errors", "odd"
    return text_table(
        header,
        [
            (
                each.case,
                each.arch,
                each.dtype,
                each.rows,
                each.launches,
                f"{each.instructions / 1e6:.2f}",
                each.worst,
                f"{each.ratio:.3f}",
                "yes" if each.same_bits else "no",
                len(each.errors),
                len(each.odd),
            )
            for each in outcomes
        ],
    )


def _counters(where: str, launch: Any, of_launch: list[Phase]) -> str:
    """A launch's phases, its sectors by argument, and its lines that stall most."""
    header = (
        "phase", "programs", "instructions", "cycles", "reordered", "trips", "reordered", "wavefronts", "ideal",
        "sectors",
    )  # fmt: skip
    rows = [tuple(asdict(phase).values())[1:] for phase in of_launch]
    sectors = {name: {k: n for k, n in counts.items() if n} for name, counts in launch.traffic.items()}
    stalls = [f"  {cycles:8d}  {loc}" for cycles, loc in costly_lines(launch, "stalled", 8)]
    title = f"{launch.kernel} {launch.grid}, {launch.warps} warps, {launch.shared} bytes of shared memory: {where}"
    moved = [f"  {name}: {counts}" for name, counts in sectors.items() if counts]
    parts = [
        title,
        text_table(header, rows),
        "sectors of 32 bytes:",
        *moved,
        "cycles that a warp stalls, by line:",
        *stalls,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
