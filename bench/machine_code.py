"""What a compiled kernel costs, read from its machine code: registers, local memory, tensor-core instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


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


def read(kernel: Any) -> MachineCode:
    """The counts of a kernel that Triton compiled."""
    from loretta_kernels._triton.compiled import binary_tool, usage

    if "cubin" in kernel.asm:
        counts = _counts(binary_tool("nvdisasm", "-c", kernel), _SASS)
    else:
        counts = _counts(kernel.asm["amdgcn"], _AMDGCN)
    return MachineCode(*usage(kernel), *counts)


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
