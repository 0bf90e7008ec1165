"""`loretta compress`: a LoRA adapter as a rep adapter, with the error of every layer."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from loretta.cli import options
from loretta.cli.errors import UserError, one_line
from loretta.cli.output import RECORD, OutputFolder, write_json
from loretta.compress import compress_lora

EPILOG = """\
example:
  loretta compress --rank 5 runs/lora --out runs/rep

runs/lora is an adapter of PEFT's LoRA. The error printed for a layer is that of its update B·A, relative, in the
Frobenius norm; a larger --rank lowers it.
"""


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "compress",
        help="turn a LoRA adapter into a smaller rep adapter",
        description="Decompose the factors of a LoRA adapter into tensor trains, and print the error of every layer.",
        epilog=EPILOG,
    )
    parser.add_argument("adapter", metavar="FOLDER", help="folder of the LoRA adapter")
    parser.add_argument(
        "--rank", type=options.positive_int, required=True, metavar="N", help="no bond has a larger rank"
    )
    parser.add_argument("--out", required=True, metavar="NEW", help="folder of the rep adapter")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compress into a new folder, which takes its place at the end."""
    if Path(args.adapter).expanduser().resolve() == Path(args.out).expanduser().resolve():
        raise UserError(f"{args.out}: is the adapter itself; choose another --out")
    with OutputFolder(args.out) as output:
        try:
            report = compress_lora(args.adapter, args.rank, output.new)
        except (OSError, ValueError) as error:
            raise UserError(one_line(error)) from error
        write_json(output.new / RECORD, {"compressed_from": args.adapter})
        output.publish()
    if args.json:
        layers = [dataclasses.asdict(layer) for layer in report.layers]
        print(json.dumps({"compressed": str(output.path), "worst": report.worst, "layers": layers}))
    else:
        print(report)
