"""`loretta plan` and `loretta params`: memory of a training step, and what is trained, counted without a weight."""

import argparse
import copy
from dataclasses import asdict
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig

from loretta.cli.models import check_method_options, load_config, make_base, method_config, skeleton, wrapped
from loretta.cli.parser import PRESETS
from loretta.cli.report import UserError, print_result, refusing, size_text, table
from loretta.plan import Batch, Devices, Memory, StepCounter, count_groups, largest_batch, memory, quantise
from loretta.targets import FAMILIES

GIB = 1 << 30
COLUMNS = ("weights", "gradients", "optimiser", "activations", "peak")
STEP = ("model", "dtype", "quant", "attention", "seq", "batch", "checkpointing", "gpus", "fsdp", "memory")


def run(args: argparse.Namespace) -> None:
    """Count on the meta device, print one table."""
    methods = [args.method] if args.command == "params" else _usable_methods(args)
    check_method_options(args, methods)
    config, task = _configuration(args)
    if args.command == "params":
        _print_groups(args, config, task)
    else:
        _print_memory(args, config, task, methods)


def _configuration(args: argparse.Namespace) -> tuple[Any, str]:
    """The transformers configuration that --model means, and the task."""
    preset = dict(PRESETS.get(args.model.lower(), {}))
    default_task = preset.pop("task", "causal_lm")
    task = args.task or default_task
    path = Path(args.model).expanduser()
    if preset:
        config = AutoConfig.for_model(**preset)
    elif path.suffix == ".json" and path.is_file():
        with refusing(f"{args.model}: is no model configuration", Exception):
            config = AutoConfig.from_pretrained(path)
    else:
        try:
            config = load_config(make_base(args.model, args.gguf, task, None))
        except UserError as error:
            raise UserError(f"{error}; presets: {', '.join(PRESETS)}") from error
    if task == "seq_cls":
        config.num_labels = args.classes
    return config, task


def _print_groups(args: argparse.Namespace, config: Any, task: str) -> None:
    """What the method trains, by group."""
    base = skeleton(config, task, args.model)
    total = sum(parameter.numel() for parameter in base.parameters())
    with torch.device("meta"):
        groups = count_groups(wrapped(base, method_config(args, args.method, task)))
    totals = dict(zip(groups, accumulate(groups.values()), strict=True))
    trainable = sum(groups.values())
    result: dict[str, Any] = {"model": args.model, "task": task, "method": args.method, "groups": groups}
    result |= {"running_totals": totals, "trainable": trainable, "base": total, "percent": 100 * trainable / total}
    lines = [(name, f"{count:,}", f"{totals[name]:,}") for name, count in groups.items()]
    share = f"trainable: {trainable:,} of {total:,} ({result['percent']:.4f} %)"
    print_result(result, f"{table([('group', 'parameters', 'running total'), *lines])}\n{share}", args.json)


def _print_memory(args: argparse.Namespace, config: Any, task: str, methods: list[str]) -> None:
    """The memory of a training step with each method."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit and args.seq > limit:
        raise UserError(f"--seq {args.seq} is more than the {limit} positions of {args.model}")
    if text.pad_token_id is None:
        text.pad_token_id = 0
    config.use_cache = False  # as the Trainer
    configs = {method: _peft_config(args, method, task, text.model_type) for method in methods}
    rows = {method: _row(args, config, task, configs[method]) for method in methods}
    head = ["method", "trainable", *COLUMNS[:-1], "peak (estimated)"]
    lines = [[name, f"{row['trainable']:,}", *(size_text(row[c], 1024) for c in COLUMNS)] for name, row in rows.items()]
    if args.memory:
        head += [f"fits {args.memory:g} GiB", "largest batch"]
        for line, row in zip(lines, rows.values(), strict=True):
            line += ["yes" if row["fits"] else "no", str(row["largest_batch"])]
    result = {"task": task, **{name: getattr(args, name) for name in STEP}, "methods": rows}
    print_result(result, table([head, *lines]), args.json)


def _usable_methods(args: argparse.Namespace) -> list[str]:
    """The methods to count, without those that the other options exclude."""
    methods = [method for method in ("adp", "rep", "lora", "full") if method in args.method]
    if args.fsdp and args.gpus == 1:
        raise UserError("--fsdp needs --gpus of at least 2: there is nothing to shard over")
    if args.quant != "none":
        if methods == ["full"]:
            raise UserError(f"--quant {args.quant} with --method full: a quantised base cannot be trained")
        methods = [method for method in methods if method != "full"]
    return methods


def _peft_config(args: argparse.Namespace, method: str, task: str, model_type: str) -> Any:
    """The PEFT configuration of a method, or None for full fine-tuning."""
    if method == "full":
        return None
    made = method_config(args, "rep" if method == "lora" else method, task)
    if method != "lora":
        return made
    family = FAMILIES.get(model_type)
    shared = ("task_type", "r", "lora_alpha", "lora_dropout", "layers_to_transform", "modules_to_save")
    targets = made.target_modules or (list(family.rep) if family else None)
    return LoraConfig(target_modules=targets, **{name: getattr(made, name) for name in shared})


def _row(args: argparse.Namespace, config: Any, task: str, method: Any) -> dict[str, Any]:
    """The bytes of a method, whether they fit and the largest batch that does."""
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
        row["largest_batch"] = largest_batch(lambda rows: at(rows).peak, args.memory * GIB)
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
