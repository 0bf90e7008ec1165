"""python -m bench.selfcheck: every operator, its output and all gradients, against its definition in fp64.

Runs on the GPU where there is one, otherwise PyTorch's path on the CPU; with --interpret the kernels run in Triton's
interpreter. Of whole numbers every answer must be equal to the definition's, of others its error may be five standard
deviations of what the backend's roundings cost. On a GPU forward and backward are also timed against a device copy of
the bytes that they must move. Exit code 1 when something misses its bar.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench.classes import add_class_options, chosen
from bench.output import add_output_options, emit
from loretta_kernels import backend
from loretta_kernels.selfcheck import DTYPES, check_cases, report, time_against_copy

FEW_ROWS, MANY_ROWS = 37, 8192
INTERPRETED_ROWS = 67  # a row takes long: more than the few for which many programs share a block
TIMED = "adp 4096x64x5"
TIME_BAR = 1.25


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where something misses its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.selfcheck", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true", help="the kernels, in Triton's interpreter on the CPU")
    parser.add_argument("--all", action="store_true", help="print every output and gradient, not the worst of each")
    add_class_options(parser)
    add_output_options(parser)
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and not args.interpret
    device = torch.device("cuda" if on_gpu else "cpu")
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, by the first call
    cases = chosen(args)
    N = INTERPRETED_ROWS if args.interpret else FEW_ROWS
    timings = []
    name = "triton" if on_gpu or args.interpret else "torch"
    with backend(name):
        rows = list(check_cases(cases, DTYPES, N, device, name))
        if on_gpu:
            timings = [line for case in cases for line in time_against_copy(case, MANY_ROWS, torch.bfloat16, device)]
    failures = [row.text for row in rows if row.missed]
    failures += [timing.text for timing in timings if timing.case == TIMED and timing.ratio > TIME_BAR]
    found = {
        "rows": [asdict(row) for row in rows],
        "timings": [asdict(timing) for timing in timings],
        "failures": failures,
    }
    emit(args, "bench.selfcheck", argv, found, report(rows, timings, args.all))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
