"""Instructions as the executor takes them: registers in places that are used again, constants, what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from bench.ptx.front import SPECIAL, Code, Constant, Instruction, width
from bench.ptx.library import Ins, kinds

PLACE = 64  # bytes; a register has 1, 2 or 4 of them beside one another
PHASE_OF = Callable[[str], str | None]


@dataclass(frozen=True)
class Program:
    """What the executor runs.

    Args:
        instructions, labels, parameters, threads: as they were read.
        code, operands: encoded.
        constants: their values, in lanes; `parameters_at` has where each parameter's lanes begin, and the grid's sizes
            under -1, -2 and -3.
        registers, special: bytes of a warp's registers, and where its own numbers lie in them.
        phases: names, by number.
        written: numbers of the parameters through which the kernel writes to global memory.
    """

    code: Code
    encoded: np.ndarray
    operands: np.ndarray
    constants: bytes
    parameters_at: dict[int, tuple[int, int]]
    registers: int
    special: int
    phases: list[str]
    written: frozenset[int]


def assemble(code: Code, phase_of: PHASE_OF = lambda loc: "all") -> Program:
    """Encode; `phase_of` names the phase of a source location, or None for that of the instruction before."""
    at, registers, special = _places(code)
    constants = bytearray(PLACE)  # an operand below 0 is the place of a constant
    where: dict[Constant, int] = {}
    parameters_at: dict[int, tuple[int, int]] = {}

    def constant(each: Constant) -> int:
        if each not in where:
            where[each] = len(constants)
            if each.parameter is not None:
                parameters_at[each.parameter] = len(constants), each.bits
            lanes = np.full(32, each.value, {16: np.uint16, 32: np.uint32, 64: np.uint64}[each.bits]).tobytes()
            constants.extend(lanes)
        return -where[each]

    phases: list[str] = []
    phase = None
    encoded = np.zeros((len(code.instructions), len(Ins._fields_)), np.int32)
    operands: list[int] = []
    number = kinds()
    meetings = _meetings(code)
    for index, (row, each) in enumerate(zip(encoded, code.instructions, strict=True)):
        phase = phase_of(each.loc) or phase or "start"
        if phase not in phases:
            phases.append(phase)
        k = [code.labels[each.target], meetings[index]] if each.kind == "BRANCH" else each.k
        first = len(operands)
        operands += [at[result] for result in each.results]
        operands += [at[source] if isinstance(source, str) else constant(source) for source in each.sources]
        guard = at[each.guard] if each.guard else -1
        row[:7] = number[each.kind], each.plain, guard, each.negated, first, len(each.results), len(operands) - first
        row[7 : 7 + len(k)] = k
        row[12:] = phases.index(phase), each.latency
    return Program(
        code,
        encoded,
        np.array([*operands, 0], np.int32),
        bytes(constants),
        parameters_at,
        registers,
        special,
        phases,
        _written(code),
    )


def _blocks(code: Code) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The first and last but one instruction of every basic block, and the blocks that can follow it."""
    instructions, count = code.instructions, len(code.instructions)
    ends = {i + 1 for i, each in enumerate(instructions) if each.kind in ("BRANCH", "RETURN")}
    starts = sorted({0, *code.labels.values(), *ends} - {count})
    of_start = {start: index for index, start in enumerate(starts)}
    blocks = list(zip(starts, [*starts[1:], count], strict=True))
    following = []
    for _, end in blocks:
        last, after = instructions[end - 1], []
        if last.kind == "BRANCH" and (target := code.labels[last.target]) in of_start:
            after.append(of_start[target])
        if (last.kind not in ("BRANCH", "RETURN") or last.guard) and end in of_start:
            after.append(of_start[end])
        following.append(after)
    return blocks, following


def _meetings(code: Code) -> dict[int, int]:
    """For every branch the instruction through which all paths from it lead first, or -1: they end apart."""
    blocks, following = _blocks(code)
    everywhere = (1 << len(blocks)) - 1
    after = [everywhere] * len(blocks)  # the blocks through which all paths from a block's beginning lead, as bits
    changed = True
    while changed:
        changed = False
        for b in reversed(range(len(blocks))):
            through = everywhere if following[b] else 0
            for next_block in following[b]:
                through &= after[next_block]
            through |= 1 << b
            changed |= through != after[b]
            after[b] = through
    meetings = {}
    for b, (_, end) in enumerate(blocks):
        if code.instructions[end - 1].kind == "BRANCH":
            others = [c for c in range(len(blocks)) if c != b and after[b] >> c & 1]
            first = max(others, key=lambda c: after[c].bit_count(), default=None)  # what follows most follows first
            meetings[end - 1] = -1 if first is None else blocks[first][0]
    return meetings


def _registers_of(each: Instruction) -> Iterator[str]:
    """What an instruction reads."""
    yield from (source for source in each.sources if isinstance(source, str))
    if each.guard:
        yield each.guard


def _places(code: Code) -> tuple[dict[str, int], int, int]:
    """Where each register lies in a warp's, their size, and where the special ones begin.

    Registers that are not alive at the same time share a place, so that a warp's fit into the processor's cache. No
    result shares with an operand of its instruction. Those of a wgmma live until a wait that may be its own.
    """
    blocks, following = _blocks(code)
    instructions = code.instructions
    waited = _waited_for(code, blocks, following)
    number: dict[str, int] = {}
    reads: list[list[int]] = []
    writes: list[list[int]] = []
    for i, each in enumerate(instructions):
        used = [*_registers_of(each), *waited.get(i, ())]
        reads.append([number.setdefault(name, len(number)) for name in used if name not in SPECIAL])
        writes.append([number.setdefault(name, len(number)) for name in each.results])
    definitions = [0] * len(number)
    for written in writes:
        for register in written:
            definitions[register] += 1
    # Liveness, by sets of registers as the bits of an integer.
    uses, kills = [], []
    for start, end in blocks:
        use = kill = 0
        for i in range(start, end):
            for register in reads[i]:
                use |= (1 << register) & ~kill
            for register in writes[i]:  # one that is written under a guard, and nowhere else, is whole there too
                if not instructions[i].guard or definitions[register] == 1:
                    kill |= 1 << register
        uses.append(use)
        kills.append(kill)
    live_in, live_out = [0] * len(blocks), [0] * len(blocks)
    changed = True
    while changed:
        changed = False
        for b in reversed(range(len(blocks))):
            out = 0
            for after in following[b]:
                out |= live_in[after]
            into = uses[b] | (out & ~kills[b])
            changed |= into != live_in[b]
            live_in[b], live_out[b] = into, out
    # The span of instructions over which each is alive, holes included.
    first, last = [len(instructions)] * len(number), [-1] * len(number)
    for b, (start, end) in enumerate(blocks):
        for alive, at in ((live_in[b], start), (live_out[b], end - 1)):
            while alive:
                register = (alive & -alive).bit_length() - 1
                alive &= alive - 1
                first[register], last[register] = min(first[register], at), max(last[register], at)
        for i in range(start, end):
            for register in (*reads[i], *writes[i]):
                first[register], last[register] = min(first[register], i), max(last[register], i)
    return _packed(number, first, last)


def _packed(number: dict[str, int], first: list[int], last: list[int]) -> tuple[dict[str, int], int, int]:
    """Places for registers with these spans, in the order in which they begin."""
    free: dict[int, list[int]] = {1: [], 2: [], 4: []}
    ending: list[tuple[int, int, int]] = []
    at: dict[str, int] = {}
    top = 0
    for name in sorted(number, key=lambda name: first[number[name]]):
        register = number[name]
        size = max(1, width(name) // 16) if name else 4
        while ending and ending[0][0] < first[register]:
            _, released, place = heappop(ending)
            heappush(free[released], place)
        if free[size]:
            place = heappop(free[size])
        else:
            place, top = top, top + size
        at[name] = place * PLACE
        heappush(ending, (last[register], size, place))
    special = top * PLACE
    at |= {name: special + 2 * PLACE * i for i, name in enumerate(SPECIAL)}
    return at, special + 2 * PLACE * len(SPECIAL), special


def _waited_for(code: Code, blocks: list[tuple[int, int]], following: list[list[int]]) -> dict[int, set[str]]:
    """For every wait of wgmma the registers of those that may be in flight before it."""
    flying: list[set[str]] = [set() for _ in blocks]
    found: dict[int, set[str]] = {}
    work = list(range(len(blocks)))
    while work:
        b = work.pop()
        now = set(flying[b])
        for i in range(*blocks[b]):
            each = code.instructions[i]
            if each.kind == "WGMMA":
                now.update(_registers_of(each))
            elif each.kind == "WGMMA_WAIT":
                found.setdefault(i, set()).update(now)
                if each.k[0] == 0:
                    now.clear()
        for after in following[b]:
            if not now <= flying[after]:
                flying[after] |= now
                work.append(after)
    return found


def _written(code: Code) -> frozenset[int]:
    """The parameters from which the address of a store or an atomic is computed; all, where that cannot be told."""
    origins: dict[str, frozenset[int]] = {}
    nothing: frozenset[int] = frozenset()

    def of(operands: list[str | Constant]) -> frozenset[int]:
        return frozenset().union(
            *(
                origins.get(each, nothing)
                if isinstance(each, str)
                else nothing
                if each.parameter is None or each.parameter < 0
                else {each.parameter}
                for each in operands
            )
        )

    changed = True
    while changed:
        changed = False
        for each in code.instructions:
            if each.kind not in ("PLAIN", "SHUFFLE"):
                continue
            found = of(each.sources)
            for result in each.results:
                if not found <= origins.get(result, nothing):
                    origins[result] = origins.get(result, nothing) | found
                    changed = True
    written: set[int] = set()
    for each in code.instructions:
        if each.kind in ("STORE", "ATOMIC"):
            found = of(each.sources[:1])
            written |= found or range(len(code.parameters))
    return frozenset(written)
