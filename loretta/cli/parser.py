"""The parser of all commands, from options.json and help.txt. It imports no library: help is printed at once."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # short name -> the name in records
FIELDS = ("text", "text_pair", "label", "prompt", "completion", "messages")


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


PRESETS: dict[str, dict[str, Any]] = json.loads(_read("presets.json"))
COMMANDS: dict[str, Any] = json.loads(_read("options.json"))  # command -> group -> flag -> how argparse reads it
SHARED: dict[str, Any] = COMMANDS.pop("shared")
METHOD_OPTIONS: dict[str, dict[str, Any]] = SHARED["hyper-parameters"]  # "adp" and "rep" name the configuration's field


def _read_help() -> dict[str, tuple[str, str]]:
    """The sections of help.txt by their command: the usage, and a summary, a description and an epilog below it."""
    text = _read("help.txt").replace("<presets>", ", ".join(PRESETS))
    sections = (section.partition("\n") for section in text.split("== loretta ")[1:])
    return {usage.split()[0]: (usage, body.strip()) for usage, _, body in sections}


HELP = _read_help()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help is the section of help.txt on its command."""

    def __init__(self, prog: str):
        usage, body = HELP[prog.partition(" ")[2] or "COMMAND"]
        _, description, epilog = body.replace("<data formats>", HELP["formats"][1]).split("\n\n", 2)
        super().__init__(
            prog,
            None if usage.startswith("COMMAND") else f"loretta {usage}",
            description,
            epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Number:
    """Reads a number; the error names what is accepted."""

    kind: type
    accepts: Callable[[Any], bool]
    wanted: str

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if self.kind is int and value is not None and value >= 2**32:
            raise argparse.ArgumentTypeError(f"must be below 4294967296, not {text!r}")
        if value is None or not self.accepts(value):
            raise argparse.ArgumentTypeError(f"must be {self.wanted}, not {text!r}")
        return value


def _number_or_name(text: str) -> float | str:
    """A number if it is one; the configuration checks the rest."""
    try:
        return float(text)
    except ValueError:
        return text


def _column(text: str) -> tuple[str, str]:
    """NAME=COLUMN as a pair."""
    name, _, column = text.partition("=")
    if name not in FIELDS or not column:
        raise argparse.ArgumentTypeError(f"must be NAME=COLUMN with NAME one of {', '.join(FIELDS)}, not {text!r}")
    return name, column


TYPES: dict[str, Any] = {  # the types in options.json
    "int": int,
    "float": float,
    "number or name": _number_or_name,
    "column": _column,
    "dtype": lambda name: DTYPES.get(name, name),
    "at least 0": Number(int, lambda value: value >= 0, "a whole number of at least 0"),
    "at least 1": Number(int, lambda value: value >= 1, "a whole number of at least 1"),
    "at least 2": Number(int, lambda value: value >= 2, "a whole number of at least 2"),
    "port": Number(int, lambda value: 0 <= value < 65536, "a whole number from 0 to 65535"),
    "threads": Number(int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024"),
    "not negative": Number(float, lambda value: 0 <= value < math.inf, "a number of at least 0"),
    "above 0": Number(float, lambda value: 0 < value < math.inf, "a number above 0"),
    "share": Number(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1"),
    "fraction": Number(float, lambda value: 0 < value < 1, "a number between 0 and 1"),
}


def make_parser() -> Parser:
    """The parser of all commands; `command` in its result is the command's name."""
    parser = Parser("loretta")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command, groups in COMMANDS.items():
        added = commands.add_parser(command, help=HELP[command][1].partition("\n")[0])
        for title, options in groups.items():
            _add_options(added.add_argument_group(title), options, {})
    return parser


def method_dest(flag: str) -> str:
    """The name of a hyper-parameter in the parsed arguments."""
    return "method_" + flag.strip("-").replace("-", "_")


def _add_options(group: Any, options: dict[str, Any], exclusive: dict[str, Any]) -> None:
    """Add the options of a group, and those of the shared group that it includes.

    Args:
        exclusive: by name, the mutually exclusive groups made so far; an option names the one it is in.
    """
    for flag, given in options.items():
        if flag == "include":
            _add_options(group, SHARED[given], exclusive)
            continue
        how = {name: value for name, value in given.items() if name not in ("exclusive", "adp", "rep")}
        if "type" in how:
            how["type"] = TYPES[how["type"]]
        if isinstance(how.get("type"), Number):
            shown = f" (default {how['default']:g})" if "default" in how else ""
            how = {"metavar": "N" if how["type"].kind is int else "X"} | how | {"help": how["help"] + shown}
        if "adp" in given or "rep" in given:
            how["dest"] = method_dest(flag)
        name = given.get("exclusive")
        if name and name not in exclusive:
            exclusive[name] = group.add_mutually_exclusive_group()
        (exclusive[name] if name else group).add_argument(flag, **how)
