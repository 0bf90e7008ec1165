"""What the commands' parsers share: the parser itself, value types, and the options for models and data."""

import argparse
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import huggingface_hub
import torch
import transformers

TASKS = ("causal_lm", "seq_cls")
METHODS = ("adp", "rep")
QUANTS = {"4bit": "4 bits (NF4, its scales quantised too)", "8bit": "8 bits"}  # name in records -> in the help
DATA_FORMATS = """\
data formats (FILE is read by its suffix; a blank line is allowed at the end only):
  .txt    plain UTF-8 text, cut into blocks of --seq-len tokens
  .jsonl  one JSON object a line, all lines of one kind:
            {"text": "Once upon a time ..."}
            {"prompt": "Translate: chat", "completion": " cat"}      loss on the completion only
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
                                                                     loss on the assistant's turns only
            {"text": "A fine film", "label": "good"}                 --task seq_cls
  .csv    a header line with those names (text | prompt,completion | text,label), then one record a line
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help keeps its lines as written."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _number(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A converter for argparse that says what is wanted."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
        return value

    return convert


natural = _number(int, lambda value: value >= 0, "a whole number of at least 0")
seed = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
at_least_two = _number(int, lambda value: value >= 2, "a whole number of at least 2")
not_negative = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
positive = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
share = _number(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")


def add_model_options(parser: argparse.ArgumentParser, *, dtypes: tuple[str, ...], required: bool) -> None:
    """--model, --gguf, --dtype, --load-in-4bit, --load-in-8bit."""
    group = parser.add_argument_group("model")
    default = "" if required else " (default: the one the adapter was trained on)"
    group.add_argument(
        "--model", required=required, metavar="PATH_OR_ID", help=f"folder, .gguf file, or hub id of the model{default}"
    )
    group.add_argument("--gguf", metavar="FILE", help="name of a GGUF file in the model's folder or repository")
    group.add_argument(
        "--dtype", choices=dtypes, help="dtype of the base model (default: bfloat16 on a GPU, else float32)"
    )
    quantised = group.add_mutually_exclusive_group()
    for quant, what in QUANTS.items():
        quantised.add_argument(
            f"--load-in-{quant}", dest="quant", action="store_const", const=quant,
            help=f"quantise the base model's weights to {what} with bitsandbytes",
        )  # fmt: skip


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """--threads, --json."""
    group = parser.add_argument_group("running")
    group.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")


def prepare(args: argparse.Namespace) -> None:
    """What every command does first: threads, and no library's words among ours."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file")  # PEFT, of a GGUF base
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
