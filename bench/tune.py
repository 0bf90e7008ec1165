"""python -m bench.tune --classes "adp 4096x64x5": what other blocks, warps and stages would cost; needs no GPU.

Compiles a direction's kernel with every candidate, leaves out what spills or does not fit into shared memory, and ranks
the others: on a GPU by their times, elsewhere by the model of `bench.predict` on the executor's cycles. What is found
belongs into the table of `loretta_kernels/_triton/plan.py`, whose rows serve a class of shapes each, not one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from bench.architectures import ARCHITECTURES
from bench.classes import add_class_options, chosen
from bench.launches import would_launch
from bench.output import add_output_options, emit
from bench.predict import GHZ, launched
from bench.ptx.__main__ import counted
from bench.ptx.counters import phases
from bench.timing import Rounds, Work
from bench.traffic import MULTIPROCESSORS
from loretta_kernels._triton import adapter
from loretta_kernels._triton.compiled import compiled, usage
from loretta_kernels._triton.operands import architecture
from loretta_kernels._triton.plan import OnePass, Plan, plan_of
from loretta_kernels.selfcheck import Case, text_table

ROWS, EXECUTED = 8192, 70
DTYPE = torch.bfloat16
DIRECTIONS = "forward", "backward"


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Args:
        blocks: as the plan has them.
        registers, spilled, shared: of a thread, of a thread, and of a program, in bytes but for the first.
        microseconds: of 8192 rows; None where it was left out.
    """

    blocks: str
    registers: int
    spilled: int
    shared: int
    microseconds: float | None
    why_not: str = ""


def field_of(plan: Plan, direction: str) -> str:
    """What of the plan serves a direction of many rows."""
    form = {"forward": "one_pass", "backward": "one_pass_backward"}[direction]
    return direction if getattr(plan, form) is None else form


def candidates(
    plan: Plan, direction: str, n: Sequence[int], c: Sequence[int], warps: Sequence[int], stages: Sequence[int]
) -> Iterator[Plan]:
    """The plan with other blocks for a direction; first as it is."""
    field = field_of(plan, direction)
    blocks = getattr(plan, field)
    yield plan
    for rows, features, w, s in product(n, c, warps, stages):
        own = {"i": features, "o": features} if isinstance(blocks, OnePass) else {"c": features}
        other = replace(blocks, n=rows, warps=w, stages=s, **own)
        if other != blocks:
            yield replace(plan, **{field: other})


@contextmanager
def planned_as(plan: Plan) -> Iterator[None]:
    """Launch by this plan whatever is launched inside."""
    adapter._kernels.cache_clear()
    try:
        with patch.object(adapter, "plan_of", lambda *args: plan):
            yield
    finally:
        adapter._kernels.cache_clear()


def tried(case: Case, arch: str, direction: str, plan: Plan, cost: Callable[..., float]) -> Tried:
    """Compile a candidate, and where nothing speaks against it take what it costs."""
    chosen_blocks = getattr(plan, field_of(plan, direction))
    blocks = f"{chosen_blocks.warps} warps, {chosen_blocks.words}, {chosen_blocks.stages} stages"
    with planned_as(plan):
        launch = would_launch(case, ROWS, DTYPE, arch, dropout=False)[direction][0]
        try:
            kernel = compiled(launch, arch)
        except Exception as error:  # whatever the compiler raises is a finding about this candidate
            return Tried(blocks, 0, 0, 0, None, f"does not compile: {type(error).__name__}")
        registers, spilled = usage(kernel)
        shared, limits = kernel.metadata.shared, ARCHITECTURES[arch]
        if spilled or shared > limits.shared_limit:
            return Tried(blocks, registers, spilled, shared, None, "spills" if spilled else "too much shared memory")
        warps = launch.options()["num_warps"]
        resident = max(1, round(limits.occupancy(registers, shared, warps) * limits.warps / warps))
        return Tried(blocks, registers, spilled, shared, cost(case, arch, direction, launch, resident))


def modelled(case: Case, arch: str, direction: str, launch: Any, resident: int) -> float:
    """Microseconds by the executor's cycles in the best order, as `bench.predict`."""
    executed = counted(case, arch, "bf16", EXECUTED).launches[DIRECTIONS.index(direction)]
    block = launch.constants["BLOCK_N"]
    one = launched([vars(phase) for phase in phases(executed)], EXECUTED, block)
    programs = launch.grid[0]
    rounds, blocks = -(-programs // (MULTIPROCESSORS * resident)), -(-ROWS // (block * programs))
    return one.microseconds(rounds, blocks)[0] + one.alone[0] / GHZ / 1e3


def timed(case: Case, arch: str, direction: str, launch: Any, resident: int) -> float:
    """Microseconds on this GPU."""
    device = torch.device("cuda")
    problem = case.training_problem(ROWS, DTYPE).to(device)
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}
    problem = problem.with_tensors(leaves)
    work = Work(problem.run, lambda y: torch.autograd.grad(y, list(leaves.values()), problem.dy))
    rounds = Rounds({"": work}, device)
    for _ in range(rounds.needed(1.0)):
        rounds()
    return 1000 * rounds.summary()[""][direction]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each class and direction, the best first."""
    args = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.tune compiles: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available()
    arch, cost = (architecture(torch.device("cuda", 0)), timed) if on_gpu else (args.arch, modelled)
    tables, found = [], {}
    for case in chosen(args):
        down, up = case.shapes if len(case.shapes) == 2 else (*case.shapes, None)
        plan = plan_of(down, up, DTYPE.itemsize, arch, case.operator == "tt_adapter")
        for direction in args.directions:
            rows = [
                tried(case, arch, direction, candidate, cost)
                for candidate in candidates(plan, direction, args.n, args.c, args.warps, args.stages)
            ]
            title = f"{case.name} {direction} on {arch}, {ROWS} rows; now: {rows[0].blocks}"
            rows.sort(key=lambda row: float("inf") if row.microseconds is None else row.microseconds)
            tables.append(f"{title}\n{_table(rows)}")
            found[f"{case.name} {direction}"] = [vars(row) for row in rows]
    emit(args, "bench.tune", argv, {"arch": arch, "tried": found}, "\n\n".join(tables))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=("sm_80", "sm_90"), default="sm_90", help="on a GPU: its own")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--n", nargs="+", type=int, default=(32, 64, 128), metavar="N", help="rows at a time")
    parser.add_argument("--c", nargs="+", type=int, default=(32, 64, 128), metavar="N", help="features at a time")
    parser.add_argument("--warps", nargs="+", type=int, default=(4, 8), metavar="N")
    parser.add_argument("--stages", nargs="+", type=int, default=(1, 2, 3), metavar="N")
    add_class_options(parser)
    add_output_options(parser)
    return parser


def _table(rows: Sequence[Tried]) -> str:
    return text_table(
        ("us", "blocks", "registers", "spilled", "shared", ""),
        [
            (
                "-" if row.microseconds is None else f"{row.microseconds:.1f}",
                row.blocks,
                row.registers,
                row.spilled,
                row.shared,
                row.why_not,
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
