"""python -m bench.resources: what every kernel of the first-rate classes costs on each architecture; needs no GPU.

Compiles what training launches for many rows and for one, and reads the machine code. Exit code 1 when a gate fails:

- no local memory on sm_90 and sm_100, nor elsewhere at rank up to 8; at larger ranks elsewhere, none of it in a loop
- no more shared memory than the architecture has
- tensor-core instructions in every kernel
- x and dy are loaded 16 bytes at a time

Of shapes that are not first-rate (--odd) it is asked that they compile and fit into shared memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from typing import Any

import torch

from bench import machine_code
from bench.architectures import ARCHITECTURES
from bench.classes import FIRST_RATE, add_class_options, chosen
from bench.global_loads import load_widths
from bench.launches import would_launch
from bench.output import add_output_options, emit
from loretta_kernels.selfcheck import Case, text_table

NEVER_SPILLS = ("sm_90", "sm_100")
SMALL_RANK = 8
WIDE = 16
MANY_ROWS, ONE_ROW = 8192, 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Resources:
    """What one kernel costs.

    Args:
        first_rate: whether its class is.
        rows: how many it is launched for.
        local_bytes, local_accesses, local_in_loops: spilled memory of a thread, and the instructions that use it.
        shared, shared_limit: bytes of a program.
        load_bytes: of the narrowest global load of x, dy and the residual.
        occupancy: share of the resident warps, an estimate.
    """

    case: str
    first_rate: bool
    rank: int
    arch: str
    dtype: str
    kernel: str
    rows: int
    num_warps: int
    registers: int
    local_bytes: int
    local_accesses: int
    local_in_loops: int
    shared: int
    shared_limit: int
    tensor_core: int
    load_bytes: dict[str, int]
    occupancy: float
    error: str = ""

    def failures(self) -> list[str]:
        """The gates that this kernel fails."""
        if self.error:
            return [f"does not compile: {self.error}"]
        failures = []
        if self.shared > self.shared_limit:
            failures.append(f"{self.shared} bytes of shared memory, {self.shared_limit} are there")
        if not self.first_rate:
            return failures
        if self.local_bytes or self.local_accesses:
            spilled = f"{self.local_bytes} bytes of local memory, {self.local_accesses} accesses"
            if self.arch in NEVER_SPILLS or self.rank <= SMALL_RANK:
                failures.append(spilled)
            elif self.local_in_loops:
                failures.append(f"{spilled}, {self.local_in_loops} of them in a loop")
        if not self.tensor_core:
            failures.append("no tensor-core instruction")
        for name in ("x", "dy"):
            if self.load_bytes.get(name, WIDE) < WIDE:
                width = self.load_bytes[name]
                failures.append(f"{name} is loaded {width} bytes at a time" if width else f"no global load of {name}")
        return failures


def measure(case: Case, arch: str, dtype: str, deterministic: bool = False, adapters: int = 0) -> list[Resources]:
    """Compile every kernel of the class, and read it."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    launches: dict[Any, Any] = {}
    for rows in (MANY_ROWS, ONE_ROW):
        for launch in chain(*would_launch(case, rows, DTYPES[dtype], arch, adapters).values()):
            source = launch.source()
            key = launch.kernel.__name__, repr(source["signature"]), repr(source["constexprs"]), repr(launch.options())
            launches.setdefault(key, (rows, launch))
    return [compiled(case, arch, dtype, rows, launch) for rows, launch in launches.values()]


def compiled(case: Case, arch: str, dtype: str, rows: int, launch: Any) -> Resources:
    """What one launch's kernel costs."""
    from loretta_kernels._triton.compiled import compiled as compile_for

    architecture, warps = ARCHITECTURES[arch], launch.options()["num_warps"]
    where = (
        case.name,
        case in FIRST_RATE,
        case.rank,
        arch,
        dtype,
        launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        rows,
    )
    try:
        kernel = compile_for(launch, arch)
    except Exception as error:  # whatever the compiler raises is a finding about this kernel
        what = _cause(error)
        return Resources(*where, warps, 0, 0, 0, 0, 0, architecture.shared_limit, 0, {}, 0.0, what)
    code = machine_code.read(kernel)
    shared = kernel.metadata.shared
    pointers = [name for name, kind in launch.source()["signature"].items() if kind.startswith("*")]
    widths = load_widths(kernel.asm["llir"], pointers)
    of_rows = [name for name in ("x_ptr", "dy_ptr", "residual_ptr") if name in pointers]
    return Resources(
        *where,
        warps,
        code.registers,
        code.local_bytes,
        code.local_accesses,
        code.local_in_loops,
        shared,
        architecture.shared_limit,
        code.tensor_core,
        {name.removesuffix("_ptr"): widths.get(name, 0) for name in of_rows},
        architecture.occupancy(code.registers, shared, warps),
    )


def _cause(error: BaseException) -> str:
    """What lies behind an error, on one line: the compiler wraps one for each function that is inlined."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"


def main(argv: Sequence[str] | None = None, measure: Callable[..., list[Resources]] = measure) -> int:
    """Print the table; 1 where a gate fails."""
    args = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.resources compiles: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    if args.deterministic:
        measure = partial(measure, deterministic=True)
    if args.adapters:
        measure = partial(measure, adapters=args.adapters)
    work = [(case, arch, dtype) for arch in args.arch for dtype in args.dtype for case in chosen(args)]
    found = [row for rows in _all(measure, work, args.jobs) for row in rows]
    failures = [
        f"{row.arch} {row.dtype} {row.case} {row.kernel} of {row.rows} rows: {what}"
        for row in found
        for what in row.failures()
    ]
    text = "\n".join([_table(found), "", *failures, f"{len(found)} kernels, {len(failures)} gates failed"])
    emit(args, "bench.resources", argv, {"rows": [asdict(row) for row in found], "failures": failures}, text)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ",".join(ARCHITECTURES)
    parser.add_argument("--arch", type=_list_of(ARCHITECTURES), default=["sm_90"], help=f"some of {known}, with commas")
    parser.add_argument("--dtype", type=_list_of(DTYPES), default=["bf16"], help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default 2)")
    parser.add_argument("--deterministic", action="store_true", help="what torch.use_deterministic_algorithms launches")
    parser.add_argument("--adapters", type=int, default=0, metavar="N", help="of N stacked, in turn for the rows")
    add_class_options(parser)
    add_output_options(parser)
    return parser


def _list_of(known: Sequence[str] | dict[str, Any]) -> Callable[[str], list[str]]:
    """A converter for argparse of names with commas between them."""

    def convert(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}")
        return names

    return convert


def _all(measure: Callable[..., Any], work: list[tuple[Case, str, str]], jobs: int) -> Iterator[list[Resources]]:
    """Measure each, in order, some at a time."""
    if jobs == 1:
        for item in work:
            yield measure(*item)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, *zip(*work, strict=True))


def _table(rows: list[Resources]) -> str:
    header = (
        "kernel", "class", "dtype", "arch", "rows", "warps", "registers", "spilled", "in loops", "shared", "limit",
        "tensor core", "load bytes", "occupancy",
    )  # fmt: skip
    return text_table(
        header,
        [
            (
                row.kernel,
                row.case,
                row.dtype,
                row.arch,
                row.rows,
                row.num_warps,
                row.registers,
                row.local_bytes,
                row.local_in_loops,
                row.shared,
                row.shared_limit,
                row.tensor_core,
                " ".join(f"{name}:{width}" for name, width in row.load_bytes.items()),
                f"{row.occupancy:.0%}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
