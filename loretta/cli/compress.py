"""`loretta compress`: a LoRA adapter as a rep adapter, with the error of every layer."""

import argparse
import dataclasses
import json
from pathlib import Path

from loretta.cli.errors import UserError, one_line
from loretta.cli.output import RECORD, OutputFolder, write_json
from loretta.compress import compress_lora


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
