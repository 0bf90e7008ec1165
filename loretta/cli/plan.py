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

from loretta.cli import options
from loretta.cli.errors import UserError, one_line
from loretta.cli.method import OPTIONS, add_hyperparameters, method_config
from loretta.cli.models import DTYPES
from loretta.cli.params import configuration
from loretta.cli.presets import PRESETS
from loretta.cli.wrapping import skeleton, wrapped
from loretta.plan import CHECKPOINTING, QUANTS, Batch, Devices, Memory, StepCounter, memory, quantise
from loretta.targets import FAMILIES

METHODS = (*options.METHODS, "lora", "full")
GIB = 1 << 30
EPILOG = f"""\
presets, known offline: {", ".join(PRESETS)}

examples:
  loretta plan --model llama-2-7b --seq 2048 --batch 4 --memory 24
  loretta plan --model llama-2-70b --seq 4096 --quant 4bit-double --checkpointing --memory 80
  loretta plan --model llama-3.1-405b --seq 4096 --gpus 16 --fsdp --checkpointing --method adp rep --memory 80

The step is run on tensors that have sizes and no memory: forward, loss, backward; AdamW; rows without padding, no
autocast, no accumulation. Weights, gradients, optimiser and activations (what autograd saves) are counted. The peak,
which adds what operators need in passing, is an estimate, and knows neither the CUDA context nor the allocator's gaps:
leave a quarter free.
lora: PEFT's LoRA with rep's --r, --alpha, --dropout and targets. full: every weight, trained in --dtype.
"""


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "plan",
        help="will it fit: memory a GPU needs, without loading a weight",
        description="Memory of a training step on each GPU: LoRETTA's methods, LoRA and full fine-tuning side by side.",
        usage="loretta plan --model MODEL --seq N [option ...]",
        epilog=EPILOG,
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, metavar="MODEL", help="preset, folder, config.json, .gguf file, or hub id"
    )
    group.add_argument("--gguf", metavar="FILE", help="name of a GGUF file in the model's folder or repository")
    group.add_argument("--task", choices=options.TASKS, help="which head (default: as `loretta params`)")
    group.add_argument("--classes", type=options.at_least_two, default=2, metavar="N", help="of seq_cls (default 2)")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the base model (default bfloat16)")
    group.add_argument(
        "--quant",
        choices=QUANTS,
        default="none",
        help="bitsandbytes base: NF4; --load-in-4bit makes 4bit-double (default none)",
    )
    group.add_argument("--attention", choices=("sdpa", "eager"), help="default: what transformers takes")
    step = parser.add_argument_group("step")
    step.add_argument("--seq", type=options.at_least_two, required=True, metavar="N", help="tokens a row")
    step.add_argument("--batch", type=options.positive_int, default=1, metavar="N", help="rows on each GPU (default 1)")
    step.add_argument(
        "--checkpointing", nargs="?", choices=CHECKPOINTING, default="none", const="non-reentrant",
        help="gradient checkpointing; alone: non-reentrant, as `loretta finetune` (default none)",
    )  # fmt: skip
    device = parser.add_argument_group("devices")
    device.add_argument("--gpus", type=options.positive_int, default=1, metavar="N", help="default 1")
    device.add_argument("--fsdp", action="store_true", help="shard over the GPUs (FSDP2); otherwise each has a copy")
    device.add_argument(
        "--memory", type=options.positive, metavar="GIB", help="what a GPU has: adds the verdict and the largest batch"
    )
    method = parser.add_argument_group("method")
    method.add_argument("--method", nargs="+", choices=METHODS, default=METHODS, help="default: all, side by side")
    add_hyperparameters(method)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, sizes in bytes")
    parser.set_defaults(run=run)


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
    for option in OPTIONS:
        if getattr(args, option.dest) is not None and not any(method in option.fields for method in _kinds(methods)):
            raise UserError(f"{option.flag} belongs to --method {next(iter(option.fields))}, not {' '.join(methods)}")
    return methods


def _kinds(methods: list[str]) -> set[str]:
    return {"rep" if method == "lora" else method for method in methods}


def _method_config(args: argparse.Namespace, method: str, task: str, config: Any) -> Any:
    """The PEFT configuration of a method, or None for full fine-tuning."""
    if method == "full":
        return None
    own = argparse.Namespace(**vars(args))
    own.method = "rep" if method == "lora" else method
    for option in OPTIONS:
        if own.method not in option.fields:
            setattr(own, option.dest, None)
    made = method_config(own, task)
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
