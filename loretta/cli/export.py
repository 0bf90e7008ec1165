"""`loretta export`: a rep adapter as a plain LoRA checkpoint."""

import argparse

from loretta import export_lora
from loretta.cli.adapters import conversion
from loretta.cli.output import RECORD, size_on_disk, write_json
from loretta.cli.report import show, shown_bytes


def run(args: argparse.Namespace) -> None:
    """Load the adapter on its base and export it."""
    with conversion(args, "exported") as job:
        export_lora(job.model, job.output.new)
        write_json(job.output.new / RECORD, job.record | {"exported_from": args.adapter})
        size = size_on_disk(job.output.new, "adapter_*")
    path = job.output.path
    show({"exported": str(path), "bytes": size}, [("LoRA checkpoint", f"{path} ({shown_bytes(size)})")], args.json)
