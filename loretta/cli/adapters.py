"""Saved adapters: which base they belong to, loading them on it, and turning them into something else."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft

from loretta.cli import options
from loretta.cli.errors import UserError, one_line
from loretta.cli.models import DTYPES, Base, Explaining, load_base, load_tokenizer, make_base
from loretta.cli.output import RECORD, OutputFolder
from loretta.cli.report import say


@dataclass(frozen=True)
class Conversion:
    """A loaded adapter, what is known of it, and the folder that takes the result."""

    model: Any
    tokenizer: Any
    record: dict[str, Any]
    output: OutputFolder


def add_conversion_options(parser: argparse.ArgumentParser, output_help: str) -> None:
    """--adapter, --output and the base's options, for commands that turn an adapter into something else."""
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help=output_help)
    options.add_model_options(parser, dtypes=DTYPES, required=False)
    options.add_run_options(parser)


@contextmanager
def conversion(args: argparse.Namespace, undoable: str) -> Iterator[Conversion]:
    """Load the adapter on its base; what is then put into `output.new` is swapped in at the end.

    Args:
        undoable: what cannot be done to an adp adapter.
    """
    base = adapter_base(args.adapter, args)
    if base.quant != args.quant:
        say(f"the adapter was trained on a {base.quant} base; --load-in-{base.quant} quantises it here too")
        base = replace(base, quant=None)
    folder = Path(args.adapter).expanduser()
    if json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type") == "LORETTA_ADP":
        raise UserError(f"{args.adapter}: an adp adapter cannot be {undoable}: it has a nonlinearity inside")
    if folder.resolve() == Path(args.output).expanduser().resolve():
        raise UserError(f"{args.output}: is the adapter itself; choose another --output")
    with OutputFolder(args.output) as output:
        tokenizer = load_tokenizer(base)
        say(f"loading {base.model}")
        model = load_adapter(load_base(base, tokenizer), args.adapter)
        try:
            yield Conversion(model, tokenizer, read_record(folder), output)
        except (TypeError, ValueError) as error:
            raise UserError(f"{args.adapter}: cannot be {undoable}: {one_line(error)}") from error
        output.publish()


def read_record(folder: Path) -> dict[str, Any]:
    """What `loretta finetune`, `merge` or `export` wrote about a folder; empty where something else made it."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def adapter_base(adapter: str, args: argparse.Namespace) -> Base:
    """The base of a saved adapter: --model where given, else what the adapter's own files say."""
    folder = Path(adapter).expanduser()
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{adapter}: no adapter there (no adapter_config.json)") from error
    except ValueError as error:
        raise UserError(f"{adapter}: its adapter_config.json is not valid JSON: {one_line(error)}") from error
    record = read_record(folder)
    name = args.model or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not say what its base model is; give --model")
    task = "seq_cls" if config.get("task_type") == "SEQ_CLS" else "causal_lm"
    gguf = args.gguf or (None if args.model else record.get("gguf"))
    quant = args.quant or (None if args.model else record.get("quant"))
    base = make_base(name, gguf, task, args.dtype or record.get("dtype"), quant)
    return base.with_labels(record["labels"]) if record.get("labels") else base


def load_adapter(model: Any, adapter: str) -> Any:
    """Put a saved adapter, LoRETTA or plain LoRA, on its base."""
    with Explaining(adapter, "adapter"):
        return peft.PeftModel.from_pretrained(model, str(Path(adapter).expanduser().resolve()))
