"""`loretta check`: whether every operator computes what it should on this machine, and on a GPU how fast."""

import argparse
import platform
import sys
from dataclasses import asdict

import torch

import loretta_kernels
from loretta.cli.report import print_result
from loretta_kernels.selfcheck import (
    DTYPES,
    adapter_case,
    check_cases,
    linear_case,
    lora_case,
    report,
    time_against_copy,
)

FEW_ROWS, MANY_ROWS = 37, 8192
CASES = (
    *(adapter_case(768, 64, 5, activation) for activation in loretta_kernels.ACTIVATIONS),
    adapter_case(4096, 64, 5),
    lora_case(768, 2304, 8, 5),
    lora_case(4096, 4096, 8, 5),
    linear_case(768, 5),
)
TIMED = ("adp 4096x64x5", "rep 4096→4096 8 5")


def run(args: argparse.Namespace) -> None:
    """Check, time, print; exit with 1 where something is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    timings = []
    backend = "triton" if device.type == "cuda" else "torch"
    with loretta_kernels.backend(backend):
        rows = list(check_cases(CASES, DTYPES, FEW_ROWS, device, backend))
        if device.type == "cuda":
            cases = [case for case in CASES if case.name in TIMED]
            timings = [line for case in cases for line in time_against_copy(case, MANY_ROWS, torch.bfloat16, device)]
    missed = any(row.missed for row in rows)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    result = {"device": where, "torch": torch.__version__, "passed": not missed}
    result |= {"rows": [asdict(row) for row in rows], "timings": [asdict(timing) for timing in timings]}
    text = f"{where}, torch {torch.__version__}, {backend}\n\n{report(rows, timings, args.all)}"
    print_result(result, text, args.json)
    if missed:
        sys.exit(1)
