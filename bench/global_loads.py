"""How wide the loads of each tensor are: every pointer in a kernel's LLVM IR is followed back to its argument."""

from __future__ import annotations

import re

_DEFINE = re.compile(r"^define [^@]*@[^(]+\((.*)\) ")
_ASSIGNMENT = re.compile(r"^\s+(%[\w.]+) = (.*)$")
_NAME = re.compile(r"%[\w.]+")
_GLOBAL = re.compile(r"ptr addrspace\([178]\) (%[\w.]+)")
_LOAD = re.compile(r"^load (?:volatile )?(?:<(\d+) x (\w+)>|(\w+)), ptr addrspace\(1\)")
_PTX_LOAD = re.compile(r"ld\.global\S*?(?:\.v(\d+))?\.[bfsu](\d+) ")
_PTX_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\S* \[.*?\], \[.*?\], (0x[0-9a-fA-F]+|\d+)")
_BUFFER_LOAD = re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.load\.(?:v(\d+))?(\w?\w\d+)\(")
_LDS_LOAD = re.compile(
    r"@llvm\.amdgcn\.(?:global|raw\.ptr\.buffer)\.load\.lds\S*\(.*?, ptr addrspace\(3\) [^,]+, i32 (\d+)"
)


def load_widths(llir: str, pointers: list[str]) -> dict[str, int]:
    """Bytes of the narrowest load of each tensor that is loaded from; `pointers` names the arguments in order."""
    lines = [line.split(", !dbg")[0] for line in llir.splitlines()]
    arguments = next(found.group(1) for line in lines if (found := _DEFINE.match(line)))
    names = re.findall(r"ptr addrspace\(1\)[^%]*(%\w+)", arguments)
    origins = {name: {pointer} for name, pointer in zip(names, pointers, strict=False)}
    _follow(lines, origins)
    widths: dict[str, int] = {}
    for line in lines:
        width = _width(line)
        if width:
            for pointer in _GLOBAL.findall(line):
                for origin in origins.get(pointer, ()):
                    widths[origin] = min(width, widths.get(origin, width))
    return widths


def _follow(lines: list[str], origins: dict[str, set[str]]) -> None:
    """Add to `origins`, until nothing changes, the arguments that each value is computed from."""
    assignments = [found.groups() for line in lines if (found := _ASSIGNMENT.match(line))]
    steps = [(name, _NAME.findall(value)) for name, value in assignments if _keeps_pointer(value)]
    changed = True
    while changed:
        changed = False
        for name, operands in steps:
            before = origins.get(name, set())
            after = before.union(*(origins[operand] for operand in operands if operand in origins))
            if len(after) > len(before):
                origins[name], changed = after, True


def _keeps_pointer(value: str) -> bool:
    """Whether an instruction's result can point where its operands do: not what was loaded or compared."""
    if "call " in value:
        return "make.buffer.rsrc" in value
    return not value.startswith(("load ", "icmp "))


def _width(line: str) -> int:
    """Bytes that a line loads from global memory by one instruction, or 0."""
    assignment = _ASSIGNMENT.match(line)
    if assignment and (found := _LOAD.match(assignment.group(2))):
        count, of_vector, scalar = found.groups()
        return int(count or 1) * _bytes(of_vector or scalar)
    if found := _PTX_LOAD.search(line):
        return int(found.group(1) or 1) * int(found.group(2)) // 8
    if found := _PTX_COPY.search(line):
        return int(found.group(1), 0)
    if found := _LDS_LOAD.search(line):
        return int(found.group(1))
    if found := _BUFFER_LOAD.search(line):
        return int(found.group(1) or 1) * _bytes(found.group(2))
    return 0


def _bytes(scalar: str) -> int:
    """Bytes of a scalar of LLVM."""
    named = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
    return named[scalar] if scalar in named else int(re.sub(r"\D", "", scalar)) // 8
