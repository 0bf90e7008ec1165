"""`loretta merge`: fold a rep adapter into its base, as a model that needs neither loretta nor PEFT."""

import argparse
import warnings

from loretta.cli.adapters import conversion
from loretta.cli.output import RECORD, size_on_disk, write_json
from loretta.cli.report import show, shown_bytes

KEPT = ("task", "labels", "seq_len", "batch_size", "dtype")


def run(args: argparse.Namespace) -> None:
    """Load the adapter on its base, merge, save with the tokenizer."""
    with conversion(args, "merged") as job:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="merging gave a bias")  # that the folder could not hold
            merged = job.model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(job.output.new)
        job.tokenizer.save_pretrained(job.output.new)
        kept = {name: job.record[name] for name in KEPT if name in job.record}
        write_json(job.output.new / RECORD, kept | {"merged_from": args.adapter})
        size = size_on_disk(job.output.new, "*.safetensors")
    path = job.output.path
    show({"merged": str(path), "bytes": size}, [("merged model", f"{path} ({shown_bytes(size)})")], args.json)
