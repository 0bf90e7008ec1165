"""What a compiled kernel costs, read from its machine code: registers, local memory, tensor-core instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """Counts of one kernel.

    Args:
        registers: of a thread.
        local_bytes: of a thread, in memory: what was spilled, and the stack.
        local_accesses: instructions that read or write local memory; `local_in_loops` of them lie in a loop.
        tensor_core: instructions that the tensor cores execute.
    """

    registers: int
    local_bytes: int
    local_accesses: int
    local_in_loops: int
    tensor_core: int


@dataclass(frozen=True)
class _Syntax:
    """How an assembly language writes what is looked for."""

    label: re.Pattern[str]
    target: re.Pattern[str]
    ends: re.Pattern[str]
    local: re.Pattern[str]
    tensor_core: re.Pattern[str]


_SASS = _Syntax(
    label=re.compile(r"^(\.L_x_\d+):"),
    target=re.compile(r"(\.L_x_\d+)\)"),
    ends=re.compile(r"\*/\s+(?:BRA(?!\.DIV|\.CONV)(?:\.\w+)*|EXIT|RET\S*|BRX\S*|JMP\S*)\b(?!\s+!?U?P\d)"),
    local=re.compile(r"\b(?:LDL|STL)\b"),
    tensor_core=re.compile(r"\b(?:HMMA|HGMMA|OMMA|QMMA|UTC\w*MMA)\b"),
)
_AMDGCN = _Syntax(
    label=re.compile(r"^(\.LBB\d+_\d+):"),
    target=re.compile(r"s_c?branch\S*\s+(\.LBB\d+_\d+)"),
    ends=re.compile(r"^\s+(?:s_branch|s_endpgm|s_setpc_b64)\b"),
    local=re.compile(r"^\s+scratch_(?:load|store)"),
    tensor_core=re.compile(r"^\s+v_s?mfma"),
)


def read(compiled: Any) -> MachineCode:
    """The counts of a kernel that `triton.compile` returned."""
    if "cubin" in compiled.asm:
        return _read_cubin(compiled.asm["cubin"])
    return _read_amdgcn(compiled.asm["amdgcn"])


def _read_cubin(cubin: bytes) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        registers, stack, local = map(int, _match(_USAGE, _tool("cuobjdump", "-res-usage", path)).groups())
        sass = _tool("nvdisasm", "-c", path)
    return MachineCode(registers, stack + local, *_counts(sass, _SASS))


def _read_amdgcn(text: str) -> MachineCode:
    def value(name: str) -> int:
        return int(_match(re.compile(rf"^\s+\.{name}:\s+(\d+)", re.MULTILINE), text).group(1))

    return MachineCode(value("vgpr_count"), value("private_segment_fixed_size"), *_counts(text, _AMDGCN))


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    """Where the pattern is in the text: it must be."""
    found = pattern.search(text)
    if found is None:
        raise RuntimeError(f"no {pattern.pattern!r} in what the disassembler prints: {text[:200]!r}")
    return found


def _tool(name: str, *arguments: str | Path) -> str:
    """What a binary tool that comes with Triton prints."""
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _counts(text: str, syntax: _Syntax) -> tuple[int, int, int]:
    """Accesses to local memory, those of them in a loop, and tensor-core instructions."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = syntax.label.match(line)
        if label:
            blocks.append([])
            labels[label.group(1)] = len(blocks) - 1
        blocks[-1].append(line)
        if syntax.target.search(line) or syntax.ends.search(line):
            blocks.append([])
    local = [sum(bool(syntax.local.search(line)) for line in block) for block in blocks]
    looping = _in_cycles([list(_successors(at, block, labels, syntax, len(blocks))) for at, block in enumerate(blocks)])
    tensor_core = sum(bool(syntax.tensor_core.search(line)) for block in blocks for line in block)
    return sum(local), sum(local[at] for at in looping), tensor_core


def _successors(at: int, block: list[str], labels: dict[str, int], syntax: _Syntax, count: int) -> Iterator[int]:
    """Blocks that can follow one."""
    last = block[-1] if block else ""
    for target in syntax.target.findall(last):
        if target in labels:
            yield labels[target]
    if at + 1 < count and not syntax.ends.search(last):
        yield at + 1


def _in_cycles(successors: list[list[int]]) -> set[int]:
    """The nodes of a graph that lie on a cycle: in a strongly connected component (Tarjan), or their own successor."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: set[int] = set()
    for root in range(len(successors)):
        if root in index:
            continue
        work = [(root, iter(successors[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, remaining = work[-1]
            following = next(remaining, None)
            if following is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    if len(component) > 1 or node in successors[node]:
                        found.update(component)
            elif following not in index:
                index[following] = low[following] = len(index)
                stack.append(following)
                work.append((following, iter(successors[following])))
            elif following in stack:
                low[node] = min(low[node], index[following])
    return found
