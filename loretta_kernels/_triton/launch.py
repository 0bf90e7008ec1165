"""One launch of one kernel as a record, and the one function that executes it.

Triton binds, specialises and looks up some forty arguments at each launch, which takes longer than many of these
kernels run. What it finds is kept here, so that a launch like an earlier one calls the compiled kernel directly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

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


class Variant:
    """A kernel with its constants and the compiler's options.

    Args:
        kernel: a `triton.jit` function, whose constants come after all its other arguments.
        constants: by name.
        num_warps, num_stages: options of the compiler.

    Attributes:
        names: the other arguments.
        compiled: what Triton compiled, by what it specialises on: device, dtypes, alignment, classes of integers.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int) -> None:
        self.kernel, self.constants = kernel, constants
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.names = kernel.arg_names[: len(kernel.arg_names) - len(constants)]
        if set(kernel.arg_names) - set(self.names) != constants.keys():
            raise ValueError(f"the last arguments of {kernel.__name__} must be {', '.join(constants)}")
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self._last = [constants[name] for name in kernel.arg_names[len(self.names) :]]

    def __call__(self, grid: tuple[int, ...], args: dict[str, Any], device: int) -> None:
        """Launch it on that device, which is the current one."""
        values = [args.get(name) for name in self.names]
        key = device, *[_specialised(value) for value in values]
        kernel = self.compiled.get(key)
        if kernel is None:
            self.compiled[key] = self.kernel[grid](**args, **self.constants, **self.options)
        else:
            kernel[(*grid, 1, 1)[:3]](*values, *self._last)


def _specialised(value: Any) -> Any:
    """What of an argument Triton specialises on, or more."""
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,)
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value >= 2**31
    return value is None


class Launch(NamedTuple):
    """A variant of a kernel, its grid, and its arguments by name."""

    variant: Variant
    grid: tuple[int, ...]
    args: dict[str, Any]

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""
        return self.variant.kernel

    @property
    def constants(self) -> dict[str, Any]:
        """Its constants by name."""
        return self.variant.constants

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
        return self.variant.options


def _is_one(value: Any) -> bool:
    """Whether Triton makes a constant of an argument."""
    return isinstance(value, int) and value == 1


def execute(launch: Launch) -> None:
    """Run it on the device of its tensors: every launch of the library passes here."""
    tensor = next(value for value in launch.args.values() if isinstance(value, Tensor))
    device = tensor.get_device()
    if device < 0 and (arch := os.environ.get(PTX_VARIABLE)):
        _execute_ptx(launch, arch)
    elif device < 0 or device == torch.cuda.current_device():
        launch.variant(launch.grid, launch.args, device)
    else:
        with torch.cuda.device(device):
            launch.variant(launch.grid, launch.args, device)


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
