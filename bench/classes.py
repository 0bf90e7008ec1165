"""The first-rate shape classes, for which every gate of the kernels holds, and odd ones, which must run too."""

from __future__ import annotations

import argparse

from loretta_kernels.selfcheck import Case, adapter_case, linear_case, lora_case
from loretta_kernels.shape import TTShape

FIRST_RATE = (
    adapter_case(768, 64, 5),
    adapter_case(1024, 64, 5),
    adapter_case(2048, 64, 5),
    adapter_case(3072, 64, 5),
    adapter_case(3584, 64, 5),
    adapter_case(4096, 64, 2),
    adapter_case(4096, 64, 5),
    adapter_case(4096, 64, 8),
    adapter_case(4096, 64, 16),
    adapter_case(5120, 64, 8),
    adapter_case(8192, 64, 5),
    adapter_case(4096, 128, 5),
    adapter_case(4096, 8, 5),
    lora_case(4096, 4096, 8, 5),
    lora_case(4096, 4096, 16, 8),
    lora_case(4096, 1024, 8, 5),
    lora_case(4096, 14336, 8, 5),
    lora_case(768, 2304, 8, 5),
    linear_case(768, 5),
    linear_case(1024, 5),
)
ODD = (
    adapter_case(53248, 512, 64),
    adapter_case(1601, 1, 1),
    Case(
        "adp 4096x64, waist 5 and bonds of 16",
        "tt_adapter",
        (TTShape((16, 16, 16), (8, 8), (16, 16, 5, 16)), TTShape((8, 8), (16, 16, 16), (16, 5, 16, 16))),
    ),
    Case(
        "rep 720→5005, six modes, bonds of 1 to 64",
        "tt_lora",
        (
            TTShape((2, 2, 2, 2, 3, 15), (3, 4), (1, 7, 64, 3, 33, 40, 5)),
            TTShape((12,), (5, 7, 11, 13), (31, 9, 64, 2)),
        ),
    ),
    linear_case(4099, 33),
)
QUICK = ("adp 4096x64x5", "rep 768→2304 8 5", "cls 768 5")


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """--quick, --odd, --classes."""
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--odd", action="store_true", help="shapes that are not first-rate, at the limits of the valid")
    parser.add_argument("--classes", nargs="+", metavar="NAME", choices=[case.name for case in FIRST_RATE])


def chosen(args: argparse.Namespace) -> tuple[Case, ...]:
    """The classes that the options name."""
    if args.odd:
        return ODD
    names = args.classes or (QUICK if args.quick else [case.name for case in FIRST_RATE])
    return tuple(case for case in FIRST_RATE if case.name in names)
