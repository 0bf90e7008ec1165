"""The entry point of the console script `loretta` and of `python -m loretta`."""

import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from loretta.cli.parser import make_parser
from loretta.cli.report import UserError, log

MODULES = {"params": "plan"} | dict.fromkeys(("merge", "export", "convert", "compress"), "conversions")
LIBRARIES = ("bitsandbytes", "huggingface_hub", "torchao", "transformers")  # they log warnings while they are used


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 where it worked, 2 with one line on stderr where something given cannot be used."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:  # argparse's way to end after --help or an error
        return int(stop.code or 0)
    try:
        _load(args).run(args)
    except UserError as error:
        log(f"loretta {args.command}: error: {error}")
        return 2
    except KeyboardInterrupt:
        print(f"\nloretta {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _load(args: Namespace) -> Any:
    """The command's module, with --threads set. No other library prints while it is imported or used."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command = import_module(f"loretta.cli.{MODULES.get(args.command, args.command)}")
    finally:
        logging.disable(logging.NOTSET)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file")  # PEFT, of a GGUF base
    if transformers := sys.modules.get("transformers"):
        transformers.logging.disable_progress_bar()
    if getattr(args, "threads", None):
        import_module("torch").set_num_threads(args.threads)
    return command


if __name__ == "__main__":
    sys.exit(main())
