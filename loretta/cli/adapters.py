"""Saved adapters: which base they belong to, loading them on it, and turning them into something else."""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file

from loretta.cli.errors import UserError, refusing
from loretta.cli.models import Base, explaining, load_base, load_tokenizer, make_base
from loretta.cli.output import RECORD, OutputFolder
from loretta.cli.parser import DTYPES, QUANTS, TASKS
from loretta.cli.report import say

# What is read back from a record: name -> test, what is accepted.
RECORDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gguf": (lambda value: value is None or isinstance(value, str), "a file name or null"),
    "task": (lambda value: value in TASKS, f"one of {', '.join(TASKS)}"),
    "dtype": (lambda value: value in DTYPES.values(), f"one of {', '.join(DTYPES.values())}"),
    "quant": (lambda value: value is None or value in list(QUANTS), f"null or one of {', '.join(QUANTS)}"),
    "labels": (
        lambda value: value is None or (isinstance(value, list) and all(type(label) is str for label in value)),
        "a list of strings or null",
    ),
    "seq_len": (lambda value: type(value) is int and value >= 2, "a whole number of at least 2"),
    "batch_size": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
}


@dataclass(frozen=True)
class Conversion:
    """A loaded adapter, what is known of it, and the folder that takes the result."""

    model: Any
    tokenizer: Any
    record: dict[str, Any]
    output: OutputFolder


@contextmanager
def new_folder(adapter: str, path: str) -> Iterator[OutputFolder]:
    """The folder of what is made out of an adapter: put into `new`, it is swapped in at the end.

    Raises:
        UserError: where it is the adapter's own folder, and for what a conversion refuses.
    """
    if Path(adapter).expanduser().resolve() == Path(path).expanduser().resolve():
        raise UserError(f"{path}: is the adapter itself; choose another folder")
    with OutputFolder(path) as output:
        with refusing(adapter, OSError, TypeError, ValueError, UserWarning):
            yield output
        output.publish()


@contextmanager
def conversion(args: argparse.Namespace, undoable: str) -> Iterator[Conversion]:
    """Load the adapter on its base; what is then put into `output.new` is swapped in at the end.

    Args:
        undoable: what cannot be done to an adp adapter with a nonlinearity.
    """
    base = adapter_base(args.adapter, args)
    if base.quant != args.quant:
        say(f"the adapter was trained on a {base.quant} base; --load-in-{base.quant} quantises it here too")
        base = replace(base, quant=None)
    folder = Path(args.adapter).expanduser()
    config = _read_object(folder / "adapter_config.json")
    if config.get("peft_type") == "LORETTA_ADP" and config.get("non_linearity") not in ("identity", "linear"):
        raise UserError(f"{args.adapter}: an adp adapter cannot be {undoable}: it has a nonlinearity inside")
    with new_folder(args.adapter, args.output) as output:
        tokenizer = load_tokenizer(base)
        say(f"loading {base.model}")
        model = load_adapter(load_base(base, tokenizer), args.adapter)
        yield Conversion(model, tokenizer, read_record(folder), output)


def read_record(folder: Path) -> dict[str, Any]:
    """What `loretta finetune`, `merge` or `export` wrote about a folder; empty where something else made it.

    Raises:
        UserError: the file is there and damaged.
    """
    file = folder / RECORD
    record = _read_object(file) if file.is_file() else {}
    for name, (is_right, wanted) in RECORDED.items():
        if name in record and not is_right(record[name]):
            raise UserError(f"{file}: {name} must be {wanted}, not {record[name]!r}"[:300])
    return record


def adapter_base(adapter: str, args: argparse.Namespace) -> Base:
    """The base of a saved adapter: --model where given, else what the adapter's own files say."""
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter there (no adapter_config.json)")
    config = _read_object(folder / "adapter_config.json")
    record = read_record(folder)
    name = args.model or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not say what its base model is; give --model")
    if not isinstance(name, str):
        raise UserError(f"{adapter}: base_model_name_or_path must be a string, not {name!r}; or give --model")
    task = "seq_cls" if config.get("task_type") == "SEQ_CLS" else "causal_lm"
    own = {} if args.model else record
    gguf, dtype, quant = args.gguf or own.get("gguf"), args.dtype or record.get("dtype"), args.quant or own.get("quant")
    return replace(make_base(name, gguf, task, dtype, quant), labels=record.get("labels"))


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or an error that names the file."""
    with refusing(f"{file}: cannot be read as JSON", OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be a JSON object, not {type(content).__name__}")
    return content


def load_adapter(model: Any, adapter: str) -> Any:
    """Put a saved adapter, LoRETTA or plain LoRA, on its base.

    Raises:
        UserError: where it cannot be read, does not fit, lacks a tensor, or holds one that is not finite: PEFT would
            copy integers, infinities or nothing at all into the model without a word.
    """
    folder = Path(adapter).expanduser().resolve()
    file = folder / "adapter_model.safetensors"
    with explaining(adapter, "adapter"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        for name, tensor in load_file(file).items() if file.exists() else ():
            if not tensor.is_floating_point():
                raise UserError(f"{file}: {name} has dtype {tensor.dtype}, expected a floating-point one")
            if not tensor.isfinite().all():
                raise UserError(f"{file}: {name} has values that are not finite")
        return peft.PeftModel.from_pretrained(model, str(folder))
