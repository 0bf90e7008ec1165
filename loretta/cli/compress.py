"""`loretta compress`: a LoRA adapter as a rep adapter, with the error of every layer."""

import argparse
import dataclasses
import json

from loretta import compress_lora
from loretta.cli.adapters import new_folder
from loretta.cli.output import RECORD, write_json


def run(args: argparse.Namespace) -> None:
    """Compress into a new folder, which takes its place at the end."""
    with new_folder(args.adapter, args.out) as output:
        report = compress_lora(args.adapter, args.rank, output.new)
        write_json(output.new / RECORD, {"compressed_from": args.adapter})
    layers = [dataclasses.asdict(layer) for layer in report.layers]
    result = {"compressed": str(output.path), "worst": report.worst, "layers": layers}
    print(json.dumps(result) if args.json else report)
