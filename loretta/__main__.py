"""The entry point of the console script `loretta` and of `python -m loretta`."""

import sys
from collections.abc import Sequence

from loretta.cli import check, compress, convert, eval, export, finetune, merge, options, params, plan
from loretta.cli.errors import UserError
from loretta.cli.report import say

COMMANDS = (finetune, eval, params, plan, export, merge, convert, compress, check)
DESCRIPTION = "Fine-tune language models with LoRETTA's tensor-train adapters (LoRETTA_adp, LoRETTA_rep)."
EPILOG = """\
start with:
  loretta finetune --model HuggingFaceTB/SmolLM2-135M --data book.txt --method adp --steps 200 --output runs/book
  loretta eval --adapter runs/book --data other.txt

Each command has its own help: loretta finetune --help
"""


def make_parser() -> options.Parser:
    """The parser of all commands."""
    parser = options.Parser(prog="loretta", description=DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=options.Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 where it worked, 2 with one line on stderr where something given cannot be used."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:  # argparse's way to end after --help or an error
        return int(stop.code or 0)
    options.prepare(args)
    try:
        args.run(args)
    except UserError as error:
        say(f"loretta {args.command}: error: {error}")
        return 2
    except KeyboardInterrupt:
        print(f"\nloretta {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
