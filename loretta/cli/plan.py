"""`loretta plan`: will it fit? Memory for each method, counted without a weight."""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig

from loretta.cli.errors import UserError, refusing
from loretta.cli.method import check_method_options, method_config
from loretta.cli.models import load_config, make_base, skeleton, wrapped
from loretta.cli.parser import PRESETS
from loretta.cli.report import show
from loretta.plan import Batch, Devices, Memory, StepCounter, memory, quantise
from loretta.targets import FAMILIES

GIB = 1 << 30
COLUMNS = ("weights", "gradients", "optimiser", "activations", "peak")
STEP = ("model", "dtype", "quant", "attention", "seq", "batch", "checkpointing", "gpus", "fsdp", "memory")


def configuration(args: argparse.Namespace) -> tuple[Any, str]:
    """The transformers configuration that --model means, for --classes of them, and the task."""
    config, task = _configuration(args)
    if task == "seq_cls":
        config.num_labels = args.classes
    return config, task


def _configuration(args: argparse.Namespace) -> tuple[Any, str]:
    if args.model.lower() in PRESETS:
        values = dict(PRESETS[args.model.lower()])
        task = values.pop("task")
        return AutoConfig.for_model(**values), args.task or task
    task = args.task or "causal_lm"
    path = Path(args.model).expanduser()
    if path.suffix == ".json" and path.is_file():
        problem = f"{args.model}: is no model configuration"
        with refusing(problem, ValueError, KeyError, TypeError, AttributeError):
            values = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(values.pop("model_type"), **values), task
    try:
        return load_config(make_base(args.model, args.gguf, task, None)), task
    except UserError as error:
        raise UserError(f"{error}; presets: {', '.join(PRESETS)}") from error


def run(args: argparse.Namespace) -> None:
    """Count each method, print one table."""
    methods = _checked_methods(args)
    config, task = configuration(args)
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit and args.seq > limit:
        raise UserError(f"--seq {args.seq} is more than the {limit} positions of {args.model}")
    if text.pad_token_id is None:
        text.pad_token_id = 0
    config.use_cache = False  # as the Trainer
    configs = {method: _method_config(args, method, task, config) for method in methods}
    rows = {method: _row(args, config, task, configs[method]) for method in methods}
    result = {"task": task, **{name: getattr(args, name) for name in STEP}, "methods": rows}
    show(result, _table(rows, args.memory), args.json)


def _checked_methods(args: argparse.Namespace) -> list[str]:
    """The methods to show, without those that the other options rule out."""
    methods = [method for method in ("adp", "rep", "lora", "full") if method in args.method]
    if args.fsdp and args.gpus == 1:
        raise UserError("--fsdp needs --gpus of at least 2: there is nothing to shard over")
    if args.quant != "none":
        if methods == ["full"]:
            raise UserError(f"--quant {args.quant} with --method full: a quantised base cannot be trained")
        methods = [method for method in methods if method != "full"]
    check_method_options(args, methods)
    return methods


def _method_config(args: argparse.Namespace, method: str, task: str, config: Any) -> Any:
    """The PEFT configuration of a method, or None for full fine-tuning."""
    if method == "full":
        return None
    made = method_config(args, "rep" if method == "lora" else method, task)
    if method != "lora":
        return made
    family = FAMILIES.get(config.get_text_config().model_type)
    shared = ("task_type", "r", "lora_alpha", "lora_dropout", "layers_to_transform", "modules_to_save")
    targets = made.target_modules or (list(family.rep) if family else None)
    return LoraConfig(target_modules=targets, **{name: getattr(made, name) for name in shared})


def _row(args: argparse.Namespace, config: Any, task: str, method: Any) -> dict[str, Any]:
    """A method's bytes, and what a GPU's memory makes of them."""
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    options |= {"attn_implementation": args.attention} if args.attention else {}
    devices = Devices(args.gpus, args.fsdp)

    def make(layers: int | None) -> nn.Module:
        base = skeleton(_shortened(config, layers), task, args.model, **options)
        quantise(base, args.quant)
        return base if method is None else wrapped(base, method, low_cpu_mem_usage=True)

    steps = StepCounter(make, args.checkpointing, 1 / devices.shards)

    @cache
    def at(rows: int) -> Memory:
        with refusing(args.model, ValueError):
            return memory(steps.model, steps.count(Batch(rows, args.seq, task)), devices)

    row = asdict(at(args.batch))
    if args.memory:
        row["fits"] = row["peak"] <= args.memory * GIB
        row["largest_batch"] = _largest_batch(lambda rows: at(rows).peak, args.memory * GIB)
    return row


def _shortened(config: Any, layers: int | None) -> Any:
    """The configuration with the first layers only."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def _largest_batch(peak: Callable[[int], int], limit: float) -> int:
    """The most rows whose peak is within the limit.

    The peak grows by pieces of straight lines, each steeper than the last: the line through two points is never above
    it further on, nor below it in between.
    """
    if peak(1) > limit:
        return 0
    low, high = 1, 2
    while peak(high) <= limit:
        slope = (peak(high) - peak(low)) / (high - low)
        low, high = high, high + (int((limit - peak(high)) / slope) + 1 if slope else high)
    while high - low > 1:
        part = (limit - peak(low)) / (peak(high) - peak(low))
        guess = min(max(low + int(part * (high - low)), low + 1), high - 1)
        low, high = (guess, high) if peak(guess) <= limit else (low, guess)
    return low


def _table(rows: dict[str, dict[str, Any]], limit: float | None) -> list[tuple[str, ...]]:
    """The lines that are printed: a head, and one for each method."""
    lines: list[tuple[str, ...]] = [("method", "trainable", *COLUMNS[:-1], "peak (estimated)")]
    for name, row in rows.items():
        lines.append((name, f"{row['trainable']:,}", *(_shown(row[column]) for column in COLUMNS)))
    if limit:
        verdicts = [("yes" if row["fits"] else "no", f"{row['largest_batch']}") for row in rows.values()]
        more = [(f"fits {limit:g} GiB", "largest batch"), *verdicts]
        lines = [line + added for line, added in zip(lines, more, strict=True)]
    return lines


def _shown(size: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= scale / 10:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1024:.1f} KiB"
