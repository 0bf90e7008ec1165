"""Launches executed on the CPU: their tensors as buffers, their PTX as a program, and what was found and counted."""

from __future__ import annotations

import ctypes as ct
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.ptx import library
from bench.ptx.compiling import ptx_of
from bench.ptx.front import parse
from bench.ptx.phases import phases_of
from bench.ptx.program import Program, assemble

VARIABLE = "LORETTA_PTX"
ODD = ("two warps write the same value", "cp.async that nothing waits for")  # no error by themselves
LIMIT = 2_000_000_000  # instructions of warps in a launch
_BUFFER_BITS = 36
_STATISTICS = ("executed", "sectors", "wavefronts", "ideal", "stalled")
_TRAFFIC = ("read", "written", "reduced", "copied", "dram_read", "dram_written")
_ALLOCATORS = ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty"), (torch, "empty_strided"))


@dataclass(frozen=True)
class Finding:
    """What is wrong, or odd, at an instruction, and the other one that takes part in it.

    Args:
        what: in words.
        kernel, text, line, loc: the kernel, the PTX instruction, its line in the PTX, and the lines of the source.
        other: the same of the other instruction, or "".
        where: the first address, program, warp and lane.
        count: how often.
    """

    what: str
    kernel: str
    text: str
    line: int
    loc: str
    other: str
    where: str
    count: int

    @property
    def is_error(self) -> bool:
        """Whether it is more than odd."""
        return self.what not in ODD

    def __str__(self) -> str:
        at = f"{self.loc or self.kernel}: {self.text} (PTX line {self.line})"
        text = f"{self.what}, {self.count} times: {at}, {self.where}"
        return f"{text}; with {self.other}" if self.other else text


@dataclass(frozen=True)
class Executed:
    """One launch, executed.

    Args:
        statistics: of every instruction `[instructions, 5]`: executed, sectors, wavefronts, ideal, stalled.
        traffic: by argument, sectors of 32 bytes: read, written, reduced, copied, dram_read, dram_written.
        phases: of every program and phase `[programs, phases, 6]`: instructions, cycles and round trips.
        instructions, barriers: of all warps.
    """

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    program: Program
    ptx: str
    statistics: np.ndarray
    traffic: dict[str, dict[str, int]]
    phases: np.ndarray
    instructions: int
    barriers: int
    findings: list[Finding]


@dataclass
class Executor:
    """Executes launches, one after the other, and keeps what it found.

    Args:
        arch: the architecture that is compiled for: "sm_80" or "sm_90".
        seed: of the order of programs and warps, and of when stores are seen.
        adversarial: whether stores are late, loads stale, and asynchronous copies and products as late as may be.
        checks: whether races, bounds and what nobody wrote are looked for.
        timing: whether cycles, sectors and wavefronts are counted.
        dram: bytes that L2 keeps, to count what DRAM sees; 0: don't.
        change: a function from PTX to PTX, for mutations.
    """

    arch: str = "sm_90"
    seed: int = 0
    adversarial: bool = True
    checks: bool = True
    timing: bool = False
    dram: int = 0
    change: Callable[[str], str] | None = None
    launches: list[Executed] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """Of all launches."""
        return [finding for launch in self.launches for finding in launch.findings]

    @property
    def errors(self) -> list[Finding]:
        """The findings that are more than odd."""
        return [finding for finding in self.findings if finding.is_error]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"sm_(8\d|90)", self.arch):
            raise ValueError(f"the executor knows PTX for sm_80 to sm_90, got {self.arch!r}")

    def __call__(self, launch: Any) -> None:
        """Execute a launch on its CPU tensors."""
        self.launches.append(self._executed(launch))

    def resident(self, shared: int, warps: int) -> int:
        """How many programs run side by side, in equal steps; 0: a few, at random."""
        return 0

    def _executed(self, launch: Any) -> Executed:
        ptx, shared, program = _assembled(launch, self.arch, self.change)
        signature = launch.source()["signature"]
        names = [name for name, kind in signature.items() if kind != "constexpr"]
        values = [launch.args.get(name, launch.constants.get(name)) for name in names]
        grid = (*launch.grid, 1, 1)[:3]
        written = {names[index] for index in program.written if index < len(names)}
        tensors = {name: value for name, value in zip(names, values, strict=True) if isinstance(value, Tensor)}
        buffers, addresses, owners = _buffers(tensors, written)
        arguments = [addresses.get(name, value) for name, value in zip(names, values, strict=True)]
        constants = _with_arguments(program, arguments, grid)
        code = program.encoded
        of_c = library.Program(
            code.ctypes.data,
            len(code),
            program.operands.ctypes.data,
            constants.ctypes.data,
            program.registers,
            program.special,
            program.code.threads // 32,
            shared,
            len(program.phases),
        )
        config = library.Config(
            self.seed * 1000003 + len(self.launches) * 7919 & 2**63 - 1,
            LIMIT,
            self.adversarial,
            self.checks,
            self.timing,
            self.resident(shared, program.code.threads // 32),
            self.dram // 32,
        )
        programs = grid[0] * grid[1] * grid[2]
        statistics = np.zeros((len(code), len(_STATISTICS)), np.uint64)
        traffic = np.zeros((max(1, len(buffers)), len(_TRAFFIC)), np.uint64)
        phases = np.zeros((programs, len(program.phases), len(library.PHASE_FIELDS)), np.int64)
        totals = np.zeros(2, np.uint64)
        found = (library.Finding * library.MOST_FINDINGS)()
        count = library.library().launch(
            ct.byref(of_c),
            ct.byref(config),
            (library.Buffer * max(1, len(buffers)))(*buffers),
            len(buffers),
            *grid,
            *(ct.c_void_p(array.ctypes.data) for array in (statistics, traffic, phases, totals)),
            found,
        )
        return Executed(
            launch.kernel.__name__,
            grid,
            program.code.threads // 32,
            shared,
            program,
            ptx,
            statistics,
            {
                " ".join(owner): dict(zip(_TRAFFIC, map(int, row), strict=True))
                for owner, row in zip(owners, traffic, strict=False)
            },
            phases,
            int(totals[0]),
            int(totals[1]),
            [_finding(each, launch.kernel.__name__, program, owners, buffers) for each in found[:count]],
        )


_compiled: dict[Any, tuple[str, int]] = {}
_programs: dict[tuple[Any, str], Program] = {}


def _assembled(launch: Any, arch: str, change: Callable[[str], str] | None) -> tuple[str, int, Program]:
    """A launch's PTX, its shared memory and program, kept in this process; `change` makes another of it."""
    source = launch.source()
    parts = source["signature"], source["constexprs"], source["attrs"], launch.options()
    key = launch.kernel, arch, *map(str, parts)
    if key not in _compiled:
        _compiled[key] = ptx_of(launch, arch)
    ptx, shared = _compiled[key]
    if change:
        ptx = change(ptx)
    if (launch.kernel, ptx) not in _programs:
        _programs[launch.kernel, ptx] = assemble(parse(ptx), phases_of(launch.kernel))
    return ptx, shared, _programs[launch.kernel, ptx]


def _buffers(tensors: dict[str, Tensor], written: set[str]) -> tuple[list[Any], dict[str, int], list[list[str]]]:
    """A buffer for every stretch of memory that arguments cover, the address of each, and whose a buffer is.

    Arguments that overlap share one. Between buffers lie 64 GB, so that no access strays from one to another.
    """
    spans = []
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"the executor takes CPU tensors, {name} is on {tensor.device}")
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = elements * tensor.element_size() if tensor.numel() else 0
        spans.append((tensor.data_ptr(), tensor.data_ptr() + size, name))
    groups: list[tuple[int, int, list[str]]] = []
    for start, end, name in sorted(spans):
        if groups and start < groups[-1][1]:
            first, last, names = groups[-1]
            groups[-1] = first, max(last, end), [*names, name]
        else:
            groups.append((start, end, [name]))
    buffers, addresses = [], {}
    for index, (start, end, names) in enumerate(groups):
        base = ((index + 1) << _BUFFER_BITS) + (1 << 20) + start % 512  # as aligned as the tensor is
        element = min(tensors[name].element_size() for name in names)
        floating = all(tensors[name].is_floating_point() for name in names)
        writes = any(name in written for name in names)
        buffers.append(library.Buffer(base, start, end - start, element, floating, writes))
        addresses |= {name: base + tensors[name].data_ptr() - start for name in names}
    return buffers, addresses, [names for _, _, names in groups]


def _with_arguments(program: Program, arguments: list[Any], grid: tuple[int, ...]) -> np.ndarray:
    """The program's constants with the values of its parameters."""
    constants = np.frombuffer(program.constants, np.uint8).copy()
    for index, (at, bits) in program.parameters_at.items():
        value = (
            grid[-1 - index] if index < 0 else arguments[index] if index < len(arguments) else 0
        )  # Triton's own come last
        kind = program.code.parameters[index][0] if index >= 0 else "u"
        if kind == "f" or isinstance(value, float):
            lanes = np.full(32, value, np.float32 if bits == 32 else np.float64)
        else:
            lanes = np.full(32, int(value) & (1 << bits) - 1, {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits])
        constants[at : at + lanes.nbytes] = lanes.view(np.uint8)
    return constants


def _finding(each: Any, kernel: str, program: Program, owners: list[list[str]], buffers: list[Any]) -> Finding:
    """What C found, in words."""
    instruction, other = program.code.instructions[each.pc], program.code.instructions[each.other]
    beside = f"{other.loc or kernel}: {other.text} (PTX line {other.line})" if each.other else ""
    index = (each.address >> _BUFFER_BITS) - 1
    if 0 <= index < len(buffers):
        buffer = buffers[index]
        where = f"{'/'.join(owners[index])} + {each.address - buffer.base} of {buffer.size} bytes"
    else:
        where = f"shared memory + {each.address}" if each.address < 2**32 else f"address {each.address:#x}"
    where += f", program {each.program}, warp {each.warp}, lane {each.lane if each.lane < 32 else 'all'}"
    what = library.findings()[each.what]
    return Finding(what, kernel, instruction.text, instruction.line, instruction.loc, beside, where, each.count)


@contextmanager
def executing(arch: str = "sm_90", *, executor: Executor | None = None, **options: Any) -> Iterator[Executor]:
    """Execute the launches made inside with CPU tensors, as compiled for `arch`; `options` are those of `Executor`.

    An `executor` takes the place of a new one.

    Memory that torch allocates inside starts as NaN, so that what nobody wrote is found. The backend "triton" serves
    CPU tensors inside.

        with executing("sm_90", seed=3) as executor, backend("triton"):
            y = tt_linear(x, ...)
        assert not executor.errors
    """
    from loretta_kernels._triton import launch
    from loretta_kernels._triton.operands import planning_for

    executor = executor or Executor(arch, **options)
    with ExitStack() as stack:
        stack.enter_context(planning_for(executor.arch))
        stack.enter_context(patch.object(launch, "execute", executor))
        stack.enter_context(patch.dict(os.environ, {VARIABLE: executor.arch}))
        for owner, name in _ALLOCATORS:
            stack.enter_context(patch.object(owner, name, _unwritten(getattr(owner, name))))
        yield executor


def _unwritten(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The allocation, with all bits set."""

    def allocated(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "cpu" and tensor.numel() and type(tensor) is Tensor:
            storage = tensor.untyped_storage()
            ct.memset(storage.data_ptr(), 0xFF, storage.nbytes())
        return tensor

    return allocated


def execute(launch: Any, arch: str) -> None:
    """Execute one launch, and raise RuntimeError where something is wrong: what LORETTA_PTX does."""
    executor = Executor(arch)
    executor(launch)
    if executor.errors:
        raise RuntimeError("\n".join(map(str, executor.errors)))
