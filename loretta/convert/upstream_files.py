"""Reads the two files of an adapter folder written by the released package (PyPI loretta 0.1.0)."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.bin"
PREFIX = "base_model.model."
PEFT_TYPES = {"BOTTLENECK": "adp", "LORA": "rep"}

_COMMON = "peft_type base_model_name_or_path task_type inference_mode target_modules tensor_rank bias modules_to_save"
_ADP = "bottleneck_size non_linearity adapter_dropout use_parallel_adapter use_adapterp scaling init_weights tensorized"
_REP = "r lora_alpha lora_dropout merge_weights fan_in_fan_out enable_lora"
FIELDS = {"adp": {*_COMMON.split(), *_ADP.split()}, "rep": {*_COMMON.split(), *_REP.split()}}

_TRAIN = re.compile(r"(?P<module>.+)\.layer\.(?:tensor\.factors\.(?P<core>\d+)|(?P<bias>bias))")


@dataclass
class UpstreamAdapter:
    """What a folder holds, keys without PEFT's prefix.

    Attributes:
        method: "adp" or "rep".
        config: the fields of ``adapter_config.json``.
        trains: the cores of every tensor train, by the name of the module that holds it.
        biases: the biases of those trains that have one.
        plain: every other tensor: dense projections, learned scalings, heads, biases of the base, norms.
    """

    method: str
    config: dict[str, Any]
    trains: dict[str, list[Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)


def read_upstream(folder: Path) -> UpstreamAdapter:
    """The adapter in a folder.

    Raises:
        FileNotFoundError: the folder or one of the two files is not there.
        ValueError: a file is damaged, holds anything but tensors, or is not the released package's.
    """
    method, config = _read_config(folder / CONFIG)
    adapter = UpstreamAdapter(method, config)
    cores: dict[str, dict[int, Tensor]] = {}
    for key, tensor in _read_weights(folder / WEIGHTS).items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{folder / WEIGHTS}: the key {key!r} does not start with {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        part = _TRAIN.fullmatch(name)
        if part is None:
            adapter.plain[name] = tensor
        elif part["bias"]:
            adapter.biases[part["module"]] = tensor
        else:
            cores.setdefault(part["module"], {})[int(part["core"])] = tensor
    for module, numbered in cores.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(f"{folder / WEIGHTS}: {module} has the cores {sorted(numbered)}; some are missing")
        adapter.trains[module] = [numbered[number] for number in range(len(numbered))]
    if stray := sorted(adapter.biases.keys() - adapter.trains.keys()):
        raise ValueError(f"{folder / WEIGHTS}: no cores beside the biases of {', '.join(stray)}")
    return adapter


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        config = json.loads(_existing(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    method = PEFT_TYPES.get(str(config.get("peft_type")))
    if method is None or "tensor_rank" not in config:
        raise ValueError(
            f"{path}: not an adapter of the released loretta: peft_type is {config.get('peft_type')!r} and tensor_rank "
            f"{config.get('tensor_rank')!r}; it writes a tensor_rank and {' or '.join(map(repr, PEFT_TYPES))}"
        )
    if unknown := sorted(config.keys() - FIELDS[method]):
        raise ValueError(f"{path}: fields that the released loretta does not write: {', '.join(unknown)}")
    for name in ("task_type", "base_model_name_or_path"):
        if not isinstance(config.get(name), str | None):
            raise ValueError(f"{path}: {name} must be text, not {config[name]!r}")
    return method, config


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, read so that no code in it can run."""
    _existing(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused: it is no plain dict of tensors, and loading what else a pickle holds can run code"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever it happens to run into
        raise ValueError(f"{path}: cannot be read; truncated or damaged? ({error})") from error
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path}: a dict of tensors is expected")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__}; a dict of tensors is expected")
        if not tensor.dim() or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} is not a tensor of finite floating-point numbers")
    return tensors


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an adapter of the released loretta has {CONFIG} and {WEIGHTS}")
    return path
