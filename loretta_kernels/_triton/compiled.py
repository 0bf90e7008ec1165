"""What the compiler makes of a launch for any architecture, in a process without TRITON_INTERPRET; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loretta_kernels._triton.launch import Launch

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


def compiled(launch: Launch, arch: str) -> Any:
    """The kernel that would be launched, compiled by Triton for `arch`: sm_90, gfx942, ..."""
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return compile(ASTSource(**launch.source()), target=target, options=launch.options())


def usage(kernel: Any) -> tuple[int, int]:
    """Registers of a thread of a compiled kernel, and bytes of its local memory: what was spilled, and the stack."""
    if "cubin" in kernel.asm:
        registers, stack, local = map(int, found(_USAGE, binary_tool("cuobjdump", "-res-usage", kernel)).groups())
        return registers, stack + local
    registers, local = (
        int(found(re.compile(rf"^\s+\.{name}:\s+(\d+)", re.MULTILINE), kernel.asm["amdgcn"]).group(1))
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, local


def binary_tool(name: str, option: str, kernel: Any) -> str:
    """What one of NVIDIA's binary tools, which come with Triton, prints of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [getattr(knobs.nvidia, name).path, option, path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def found(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    """Where the pattern is in the text: it must be."""
    match = pattern.search(text)
    if match is None:
        raise RuntimeError(f"no {pattern.pattern!r} in what the compiler prints: {text[:200]!r}")
    return match
