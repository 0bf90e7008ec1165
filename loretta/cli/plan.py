"""`loretta plan`: will it fit? Memory for each method, counted without a weight."""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from loretta.cli.errors import UserError, one_line
from loretta.cli.method import check_method_options, method_config
from loretta.cli.params import configuration
from loretta.cli.wrapping import skeleton, wrapped
from loretta.plan import Batch, Devices, Memory, StepCounter, memory, quantise
from loretta.targets import FAMILIES

METHODS = ("adp", "rep", "lora", "full")
GIB = 1 << 30


def run(args: argparse.Namespace) -> None:
    """Count each method, print one table."""
    methods = _checked_methods(args)
    config, task = configuration(args)
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit and args.seq > limit:
        raise UserError(f"--seq {args.seq} is more than the {limit} positions of {args.model}")
    if task == "seq_cls":
        config.num_labels = args.classes
    if text.pad_token_id is None:
        text.pad_token_id = 0
    config.use_cache = False  # as the Trainer
    configs = {method: _method_config(args, method, task, config) for method in methods}
    rows = {method: _row(args, config, task, configs[method]) for method in methods}
    if args.json:
        shown = ("model", "dtype", "quant", "attention", "seq", "batch", "checkpointing", "gpus", "fsdp", "memory")
        print(json.dumps({"task": task, **{name: getattr(args, name) for name in shown}, "methods": rows}))
    else:
        _print(args, rows)


def _checked_methods(args: argparse.Namespace) -> list[str]:
    """The methods to show, without those that the other options rule out."""
    methods = [method for method in METHODS if method in args.method]
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
    return LoraConfig(
        task_type=made.task_type,
        r=made.r,
        lora_alpha=made.lora_alpha,
        lora_dropout=made.lora_dropout,
        target_modules=made.target_modules or (list(family.rep) if family else None),
        layers_to_transform=made.layers_to_transform,
        modules_to_save=made.modules_to_save,
    )


def _row(args: argparse.Namespace, config: Any, task: str, method: Any) -> dict[str, Any]:
    """A method's bytes, and what a GPU's memory makes of them."""
    dtype = {"dtype": getattr(torch, args.dtype)}
    attention = {"attn_implementation": args.attention} if args.attention else {}
    devices = Devices(args.gpus, args.fsdp)

    def make(layers: int | None) -> nn.Module:
        base = skeleton(_shortened(config, layers), task, args.model, **dtype, **attention)
        quantise(base, args.quant)
        return base if method is None else wrapped(base, method, low_cpu_mem_usage=True)

    steps = StepCounter(make, args.checkpointing, 1 / devices.shards)

    @cache
    def at(rows: int) -> Memory:
        try:
            return memory(steps.model, steps.count(Batch(rows, args.seq, task)), devices)
        except ValueError as error:
            raise UserError(f"{args.model}: {one_line(error)}") from error

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
        share = (limit - peak(low)) / (peak(high) - peak(low))
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (guess, high) if peak(guess) <= limit else (low, guess)
    return low


def _print(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """A table with a line for each method."""
    columns = ("weights", "gradients", "optimiser", "activations", "peak")
    table: list[tuple[str, ...]] = [("method", "trainable", *columns[:-1], "peak (estimated)")]
    table += [
        (name, f"{row['trainable']:,}", *(_shown(row[column]) for column in columns)) for name, row in rows.items()
    ]
    if args.memory:
        table[0] += (f"fits {args.memory:g} GiB", "largest batch")
        for number, row in enumerate(rows.values(), 1):
            table[number] += ("yes" if row["fits"] else "no", f"{row['largest_batch']}")
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print(
            "  ".join(
                f"{cell:>{width}}" if column else f"{cell:<{width}}"
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def _shown(size: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= scale / 10:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1024:.1f} KiB"
