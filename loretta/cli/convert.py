"""`loretta convert`: an adapter that the released package wrote, as one of this package."""

import argparse
from pathlib import Path
from typing import Any

from loretta.cli.errors import UserError, one_line
from loretta.cli.output import RECORD, OutputFolder, size_on_disk, write_json
from loretta.cli.report import say, show, shown_bytes
from loretta.convert import convert_upstream

EPILOG = """\
example:
  loretta convert --from upstream runs/old --out runs/new

runs/old holds adapter_config.json and adapter_model.bin, as the released package (PyPI loretta 0.1.0) writes them.
"""


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "convert",
        help="take over an adapter of the released loretta package",
        description="Write an adapter of the released loretta package as one that PEFT loads once loretta-tt is "
        "imported. The function is the same; a pickle that holds more than tensors is refused.",
        epilog=EPILOG,
    )
    parser.add_argument("adapter", metavar="FOLDER", help="folder of the released package's adapter")
    parser.add_argument("--from", dest="source", required=True, choices=("upstream",), help="what wrote the folder")
    parser.add_argument("--out", required=True, metavar="NEW", help="folder of the new adapter")
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="the base model; its configuration is read (default: what the adapter says)",
    )
    parser.add_argument(
        "--missing",
        choices=("refuse", "base"),
        default="refuse",
        help="what was trained but not saved (norms, DeBERTa's pooler): list it and stop, or take the base model's own",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert into a new folder, which takes its place at the end."""
    if Path(args.adapter).expanduser().resolve() == Path(args.out).expanduser().resolve():
        raise UserError(f"{args.out}: is the adapter itself; choose another --out")
    base = args.model and (str(Path(args.model).expanduser().resolve()) if Path(args.model).exists() else args.model)
    with OutputFolder(args.out) as output:
        try:
            done = convert_upstream(args.adapter, output.new, base, missing=args.missing)
        except (OSError, ValueError) as error:
            raise UserError(one_line(error)) from error
        for name in done.from_base:
            say(f"not in the folder, left to the base model: {name}")
        record: dict[str, Any] = {"converted_from": args.adapter}
        if done.config.task_type == "SEQ_CLS" and done.num_labels:
            record |= {"task": "seq_cls", "labels": [str(number) for number in range(done.num_labels)]}
        write_json(output.new / RECORD, record)
        size = size_on_disk(output.new, "adapter_*")
        output.publish()
    result = {"converted": str(output.path), "method": done.method, "from_base": done.from_base, "bytes": size}
    lines = [(f"{done.method} adapter", f"{output.path} ({shown_bytes(size)})")]
    lines += [
        (matrix, f"{shape.in_modes} x {shape.out_modes}, ranks {shape.ranks}") for matrix, shape in done.trains.items()
    ]
    show(result, lines, args.json)
