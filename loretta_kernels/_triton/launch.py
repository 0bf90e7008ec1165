"""One launch of one kernel as a record, and the one function that executes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from loretta_kernels._dispatch import PTX_VARIABLE

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name, its constants by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def source(self) -> dict[str, Any]:
        """What `triton.compiler.ASTSource` takes to compile exactly what would be launched, tensors of meta included.

            triton.compile(ASTSource(**launch.source()), target=GPUTarget("cuda", 90, 32), options=launch.options())

        It must run in a process without TRITON_INTERPRET. Pointers count as 16-byte aligned, as torch allocates them.
        """
        signature: dict[str, str] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attrs: dict[tuple[int, ...], list[list[Any]]] = {}
        as_they_are = self.kernel.do_not_specialize
        for index, name in enumerate(self.kernel.arg_names):
            value = self.args.get(name, self.constants.get(name))
            if isinstance(value, Tensor):
                signature[name], attrs[index,] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif name in self.constants or value is None or (_is_one(value) and name not in as_they_are):
                signature[name], constexprs[index,] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if value >= 2**31 else "i32"
                if value % 16 == 0 and name not in as_they_are:
                    attrs[index,] = [["tt.divisibility", 16]]
        return {"fn": self.kernel, "signature": signature, "constexprs": constexprs, "attrs": attrs}

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def _is_one(value: Any) -> bool:
    """Whether Triton makes a constant of an argument."""
    return isinstance(value, int) and value == 1


def execute(launch: Launch) -> None:
    """Run it on the device of its tensors: every launch of the library passes here."""
    tensor = next(value for value in launch.args.values() if isinstance(value, Tensor))
    if tensor.device.type == "cpu" and (arch := os.environ.get(PTX_VARIABLE)):
        _execute_ptx(launch, arch)
        return
    with torch.cuda.device_of(tensor):
        launch.kernel[launch.grid](
            **launch.args, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages
        )


def _execute_ptx(launch: Launch, arch: str) -> None:
    """Run what would be compiled for this architecture on the CPU, by the executor in the repository's bench folder."""
    try:
        executor = import_module("bench.ptx")
    except ImportError as error:
        raise RuntimeError(f"{PTX_VARIABLE} needs the repository's folder on the path: {error}") from None
    executor.execute(launch, arch)


@contextmanager
def recorded(run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches made inside; unless `run`, nothing is executed, so that tensors of meta will do."""
    global execute
    launches: list[Launch] = []
    previous = execute

    def collect(launch: Launch) -> None:
        launches.append(launch)
        if run:
            previous(launch)

    execute = collect
    try:
        yield launches
    finally:
        execute = previous
