"""Saved adapters: which base they belong to, and loading them on it."""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file

from loretta.cli.models import AUTO_MODELS, Base, explaining, load_base, make_base
from loretta.cli.output import RECORD
from loretta.cli.parser import DTYPES
from loretta.cli.report import UserError, refusing

# What is read from a record: name -> whether a value is accepted, and the accepted values in words.
RECORDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gguf": (lambda value: value is None or isinstance(value, str), "a file name or null"),
    "task": (lambda value: value in list(AUTO_MODELS), f"one of {', '.join(AUTO_MODELS)}"),
    "dtype": (lambda value: value in DTYPES.values(), f"one of {', '.join(DTYPES.values())}"),
    "quant": (lambda value: value in (None, "4bit", "8bit"), "null, 4bit or 8bit"),
    "labels": (
        lambda value: value is None or (isinstance(value, list) and all(type(label) is str for label in value)),
        "a list of strings or null",
    ),
    "seq_len": (lambda value: type(value) is int and value >= 2, "a whole number of at least 2"),
    "batch_size": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
}


def read_record(folder: Path) -> dict[str, Any]:
    """What this command line recorded about a folder that it wrote; empty for any other folder."""
    file = folder / RECORD
    return checked_record(str(file), read_object(file) if file.is_file() else {})


def checked_record(where: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record whose values are accepted ones; `where` it is goes into the error."""
    for name, (is_right, wanted) in RECORDED.items():
        if name in record and not is_right(record[name]):
            raise UserError(f"{where}: {name} must be {wanted}, not {record[name]!r}"[:300])
    return record


def adapter_base(adapter: str, args: argparse.Namespace) -> Base:
    """The base of a saved adapter: --model where given, else what the adapter's own files say."""
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter there (no adapter_config.json)")
    return base_of(adapter, read_object(folder / "adapter_config.json"), read_record(folder), args)


def base_of(adapter: str, config: dict[str, Any], record: dict[str, Any], args: argparse.Namespace) -> Base:
    """The base that a configuration and a record name, where the options name no other; `adapter` is for errors."""
    name = args.model or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not say what its base model is; give --model")
    if not isinstance(name, str):
        raise UserError(f"{adapter}: base_model_name_or_path must be a string, not {name!r}; or give --model")
    task = "seq_cls" if config.get("task_type") == "SEQ_CLS" else "causal_lm"
    own = {} if args.model else record
    gguf, dtype, quant = args.gguf or own.get("gguf"), args.dtype or record.get("dtype"), args.quant or own.get("quant")
    return replace(make_base(name, gguf, task, dtype, quant), labels=record.get("labels"))


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or an error that names the file."""
    with refusing(f"{file}: cannot be read as JSON", OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be a JSON object, not {type(content).__name__}")
    return content


def load_with_adapter(base: Base, tokenizer: Any, adapter: str | None) -> Any:
    """The base model, with a saved adapter, LoRETTA or plain LoRA, on it if one is given.

    PEFT would load integers, infinities, or nothing where a tensor is missing, without an error.
    """
    model = load_base(base, tokenizer)
    if adapter is None:
        return model
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
