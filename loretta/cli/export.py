"""`loretta export`: a rep adapter as a plain LoRA checkpoint."""

import argparse
import json

from loretta import export_lora
from loretta.cli.adapters import conversion
from loretta.cli.output import RECORD, size_on_disk, write_json
from loretta.cli.report import show, shown_bytes


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
