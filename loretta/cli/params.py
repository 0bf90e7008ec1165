"""`loretta params`: what a method would train on a model, by group, counted without loading a weight."""

import argparse
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from loretta.cli.method import check_method_options, method_config
from loretta.cli.models import skeleton, wrapped
from loretta.cli.plan import configuration
from loretta.cli.report import show
from loretta.norms import is_feature_norm
from loretta.tensor_train import TensorTrain

GROUPS = ("cores", "dense adapters", "biases", "scalings", "base biases", "norms", "tensorised head", "head")


def run(args: argparse.Namespace) -> None:
    """Build the model on the meta device, wrap it, count, print."""
    config, task = configuration(args)
    check_method_options(args, [args.method])
    method = method_config(args, args.method, task)
    base = skeleton(config, task, args.model)
    total = sum(parameter.numel() for parameter in base.parameters())
    with torch.device("meta"):
        groups = count_groups(wrapped(base, method))
    totals = dict(zip(groups, accumulate(groups.values()), strict=True))
    trainable = sum(groups.values())
    result: dict[str, Any] = {"model": args.model, "task": task, "method": args.method, "groups": groups}
    result |= {"running_totals": totals, "trainable": trainable, "base": total, "percent": 100 * trainable / total}
    lines = [(name, f"{count:,}", f"{totals[name]:,}") for name, count in groups.items()]
    show(result, [("group", "parameters", "running total"), *lines], args.json)
    if not args.json:
        print(f"trainable: {trainable:,} of {total:,} ({result['percent']:.4f} %)")


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
