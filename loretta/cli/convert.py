"""`loretta convert`: an adapter that the released package wrote, as one of this package."""

import argparse
from pathlib import Path
from typing import Any

from loretta import convert_upstream
from loretta.cli.adapters import new_folder
from loretta.cli.output import RECORD, size_on_disk, write_json
from loretta.cli.report import say, show, shown_bytes


def run(args: argparse.Namespace) -> None:
    """Convert into a new folder, which takes its place at the end."""
    base = args.model and (str(Path(args.model).expanduser().resolve()) if Path(args.model).exists() else args.model)
    with new_folder(args.adapter, args.out) as output:
        done = convert_upstream(args.adapter, output.new, base, missing=args.missing)
        for name in done.from_base:
            say(f"not in the folder, left to the base model: {name}")
        record: dict[str, Any] = {"converted_from": args.adapter}
        if done.config.task_type == "SEQ_CLS" and done.num_labels:
            record |= {"task": "seq_cls", "labels": [str(number) for number in range(done.num_labels)]}
        write_json(output.new / RECORD, record)
        size = size_on_disk(output.new, "adapter_*")
    result = {"converted": str(output.path), "method": done.method, "from_base": done.from_base, "bytes": size}
    lines = [(f"{done.method} adapter", f"{output.path} ({shown_bytes(size)})")]
    for matrix, shape in done.trains.items():
        lines.append((matrix, f"{shape.in_modes} x {shape.out_modes}, ranks {shape.ranks}"))
    show(result, lines, args.json)
