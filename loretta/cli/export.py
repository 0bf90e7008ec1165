"""`loretta export`: a rep adapter as a plain LoRA checkpoint."""

import argparse
from typing import Any

from loretta import export_lora
from loretta.cli.adapters import add_conversion_options, conversion
from loretta.cli.output import RECORD, size_on_disk, write_json
from loretta.cli.report import show, shown_bytes

EPILOG = """\
example:
  loretta export --adapter runs/book --output runs/book-lora

Stock PEFT, and whatever reads its format, loads the result without loretta.
"""


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "export",
        help="write a rep adapter as a plain LoRA checkpoint",
        description="Write a rep adapter, or an adp adapter trained with --activation identity, as a plain LoRA "
        "checkpoint with the same logits, norms and heads included.",
        epilog=EPILOG,
    )
    add_conversion_options(parser, "folder of the LoRA checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load the adapter on its base and export it."""
    with conversion(args, "exported") as job:
        export_lora(job.model, job.output.new)
        write_json(job.output.new / RECORD, job.record | {"exported_from": args.adapter})
        size = size_on_disk(job.output.new, "adapter_*")
    path = job.output.path
    show({"exported": str(path), "bytes": size}, [("LoRA checkpoint", f"{path} ({shown_bytes(size)})")], args.json)
