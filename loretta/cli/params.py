"""`loretta params`: what a method would train on a model, counted without loading a weight."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from loretta.cli.errors import UserError, one_line
from loretta.cli.method import check_method_options, method_config
from loretta.cli.models import load_config, make_base
from loretta.cli.parser import PRESETS
from loretta.cli.wrapping import skeleton, wrapped
from loretta.norms import is_feature_norm
from loretta.tensor_train import TensorTrain

GROUPS = ("cores", "dense adapters", "biases", "scalings", "base biases", "norms", "tensorised head", "head")


def run(args: argparse.Namespace) -> None:
    """Build the model on the meta device, wrap it, count, print."""
    config, task = configuration(args)
    check_method_options(args, [args.method])
    method = method_config(args, args.method, task)
    if task == "seq_cls":
        config.num_labels = args.classes
    base = skeleton(config, task, args.model)
    total = sum(parameter.numel() for parameter in base.parameters())
    with torch.device("meta"):
        groups = count_groups(wrapped(base, method))
    trainable = sum(groups.values())
    result = {
        "model": args.model,
        "task": task,
        "method": args.method,
        "groups": groups,
        "running_totals": _running_totals(groups),
        "trainable": trainable,
        "base": total,
        "percent": 100 * trainable / total,
    }
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)


def count_groups(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of a wrapped model by group, in the order of `GROUPS`, empty groups left out."""
    counts = dict.fromkeys(GROUPS, 0)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                counts[_group(path, module, name)] += parameter.numel()
    return {group: count for group, count in counts.items() if count}


def _group(path: str, module: nn.Module, name: str) -> str:
    """The group of the parameter `name` of the module at `path`."""
    if ".modules_to_save." in f".{path}.":
        if is_feature_norm(module):
            return "norms"
        return "tensorised head" if isinstance(module, TensorTrain) else "head"
    if "loretta_" not in f"{path}.{name}":
        return "base biases"
    if "scaling" in f"{path}.{name}":
        return "scalings"
    return {"cores": "cores", "bias": "biases"}.get(name, "dense adapters")


def configuration(args: argparse.Namespace) -> tuple[Any, str]:
    """The transformers configuration that --model means, and the task."""
    if args.model.lower() in PRESETS:
        values = dict(PRESETS[args.model.lower()])
        task = values.pop("task")
        return AutoConfig.for_model(**values), args.task or task
    task = args.task or "causal_lm"
    path = Path(args.model).expanduser()
    if path.suffix == ".json" and path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(values.pop("model_type"), **values), task
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{args.model}: is no model configuration: {one_line(error)[:200]}") from error
    try:
        return load_config(make_base(args.model, args.gguf, task, None)), task
    except UserError as error:
        raise UserError(f"{error}; presets: {', '.join(PRESETS)}") from error


def _running_totals(groups: dict[str, int]) -> dict[str, int]:
    total, totals = 0, {}
    for name, count in groups.items():
        total += count
        totals[name] = total
    return totals


def _print(result: dict[str, Any]) -> None:
    """A table of group, count and running total, and the share of the base."""
    rows = [("group", "parameters", "running total")]
    rows += [(name, f"{count:,}", f"{result['running_totals'][name]:,}") for name, count in result["groups"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, count, total in rows:
        print(f"{name:<{widths[0]}}  {count:>{widths[1]}}  {total:>{widths[2]}}")
    print(f"trainable: {result['trainable']:,} of {result['base']:,} ({result['percent']:.4f} %)")
