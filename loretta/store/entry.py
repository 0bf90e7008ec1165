"""What may enter a store: an adapter's folder as PEFT writes it, read and checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loretta.cli.output import RECORD

TRAIN = re.compile(r".+\.loretta_(rep|adp)_\w+\.(cores|bias|value)")
# Fields of a configuration that change nothing once the adapter is trained.
FREE = {
    "peft_version", "auto_mapping", "inference_mode", "init_weights", "lora_dropout", "adapter_dropout",
    "merge_weights", "train_layernorm", "tensorize_head",
}  # fmt: skip


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """An adapter that a store can hold: its configuration, what is recorded of its base, its tensors.

    Raises:
        ValueError: a store cannot hold it; the message names the folder and the reason.
        FileNotFoundError: there is no adapter.
    """
    file = folder / "adapter_model.safetensors"
    for needed in (folder / "adapter_config.json", file):
        if not needed.is_file():
            raise FileNotFoundError(f"{folder}: no adapter there (no {needed.name})")
    config = _read_object(folder / "adapter_config.json")
    record = _read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    method = config.get("peft_type")
    if method not in ("LORETTA_ADP", "LORETTA_REP"):
        raise ValueError(f"{folder}: a store takes LoRETTA adapters, not {method!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: holds biases of the base (bias={config['bias']!r}), which a store does not serve")
    if config.get("tensorized") is False:
        raise ValueError(f"{folder}: its projections are dense (tensorized=False), a store takes tensor trains")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if not tensors:
        raise ValueError(f"{file}: is empty")
    if strange := [key for key, tensor in tensors.items() if tensor.dim() > 1 or not _is_known(key, config)]:
        raise ValueError(f"{file}: holds {strange[0]}; a store takes tensor trains and trained norms, nothing else")
    config = {name: _as_set(value) for name, value in config.items()}
    return config, {name: record.get(name) for name in ("gguf", "dtype", "quant")}, tensors


def _is_known(key: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is of a train, or of a module that the configuration says is trained whole."""
    module = key.rpartition(".")[0]
    return bool(TRAIN.fullmatch(key)) or any(
        module.endswith(f".{name}") for name in config.get("modules_to_save") or ()
    )


def _as_set(value: Any) -> Any:
    """A list of names in one order: PEFT writes sets in any."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a JSON object, not {type(content).__name__}")
    return content
