"""`loretta export`: a rep adapter as a plain LoRA checkpoint."""

import argparse
import json
from typing import Any

from loretta import export_lora
from loretta.cli.adapters import add_conversion_options, conversion
from loretta.cli.output import RECORD, size_on_disk, write_json
from loretta.cli.report import show, shown_bytes

TARGETS = ("peft", "vllm", "sglang", "llama.cpp")

EPILOG = """\
example:
  loretta export --adapter runs/book --output runs/book-lora
  loretta export --adapter runs/book --for vllm --output runs/book-vllm

Stock PEFT loads the result without loretta. Servers read less of the format than PEFT, so say which one it is for:
what it would ignore or misread is refused.
"""


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "export",
        help="write a rep adapter as a plain LoRA checkpoint",
        description="Write a rep adapter as a plain LoRA checkpoint with the same logits; for PEFT with its norms and "
        "heads, for servers with one rank and one scale.",
        epilog=EPILOG,
    )
    add_conversion_options(parser, "folder of the LoRA checkpoint")
    parser.add_argument(
        "--for", dest="target", choices=TARGETS, default="peft", help="who reads it (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load the adapter on its base and export it."""
    with conversion(args, "exported") as job:
        export_lora(job.model, job.output.new, target=args.target)
        write_json(job.output.new / RECORD, job.record | {"exported_from": args.adapter, "exported_for": args.target})
        size = size_on_disk(job.output.new, "adapter_*")
        rank = json.loads((job.output.new / "adapter_config.json").read_text())["r"]
    path = job.output.path
    show(
        {"exported": str(path), "for": args.target, "rank": rank, "bytes": size},
        [("LoRA checkpoint", f"{path} ({shown_bytes(size)}), rank {rank}, for {args.target}")],
        args.json,
    )
