"""What a launch costs, by phase: instructions, cycles on a simple scoreboard, round trips, shared memory, sectors.

The scoreboard is one program's alone on its multiprocessor: a warp issues in order, one instruction a scheduler and
cycle, when its operands are ready (ALU 5 cycles, special functions 20, shared memory 30, mma 33, L1 35, L2 280,
atomics 300, a barrier 20). `cycles` follows PTX's order; `reordered` lets every basic block run in the best order, as
ptxas may. For comparing phases and kernels, not for predicting microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.ptx.executor import Executed

COLUMNS = ("executed", "sectors", "wavefronts", "ideal", "stalled")


@dataclass(frozen=True)
class Phase:
    """A phase of a launch; all but `programs` are of one program that goes through it.

    Args:
        programs: that go through it.
        instructions: of all warps.
        cycles, reordered: of a warp, in PTX's order, and in the best order of every basic block.
        round_trips, round_trips_reordered: to L2 or beyond, one after the other.
        wavefronts, ideal_wavefronts: of shared memory, and without bank conflicts.
        sectors: of global memory.
    """

    launch: str
    phase: str
    programs: int
    instructions: int
    cycles: int
    reordered: int
    round_trips: int
    round_trips_reordered: int
    wavefronts: int
    ideal_wavefronts: int
    sectors: int


def phases(launch: Executed) -> list[Phase]:
    """The phases of a launch that was executed with `timing`, in the order in which they are met."""
    found = []
    of_instruction = launch.program.encoded[:, -2]
    for index, name in enumerate(launch.program.phases):
        of_programs = launch.phases[:, index]
        through = of_programs[:, 0] > 0
        programs = int(through.sum())
        if not programs:
            continue
        instructions, cycles, reordered, trips, trips_reordered, _ = of_programs[through].sum(0) / programs
        _, sectors, wavefronts, ideal, _ = launch.statistics[of_instruction == index].sum(0) / programs
        counts = instructions, cycles / launch.warps, reordered / launch.warps, trips, trips_reordered
        shared = wavefronts, ideal, sectors
        found.append(Phase(launch.kernel, name, programs, *(round(float(number)) for number in (*counts, *shared))))
    return found


def costly_lines(launch: Executed, column: str, most: int) -> list[tuple[int, str]]:
    """The source lines that cost most of a column of the statistics, of a warp."""
    cost: dict[str, int] = {}
    for instruction, number in zip(
        launch.program.code.instructions, launch.statistics[:, COLUMNS.index(column)].astype(np.int64), strict=True
    ):
        cost[instruction.loc] = cost.get(instruction.loc, 0) + int(number)
    warps = launch.warps * len(launch.phases)
    return sorted(((number // warps, loc) for loc, number in cost.items()), reverse=True)[:most]
