"""Folders of small adapters, as training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from tests.tiny_models import tiny_model

WEIGHTS = "adapter_model.safetensors"


def save_adapter(folder: Path, method: str = "rep", base: str = "some/llama", **fields: Any) -> Path:
    """A random adapter of a tiny Llama without trained norms, unless the fields say otherwise."""
    config = {"rep": LorettaRepConfig, "adp": LorettaAdpConfig}[method]
    fields = {"task_type": "CAUSAL_LM", "init_weights": False, "train_layernorm": False} | fields
    model = tiny_model("llama")
    model.name_or_path = model.config._name_or_path = base
    get_peft_model(model, config(**fields)).save_pretrained(folder)
    return folder


def variant(folder: Path, of: Path, seed: int) -> Path:
    """The same adapter with other numbers."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((of / "adapter_config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(of / WEIGHTS)
    for key, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[key] = tensor + 0.2 * noise if "norm" in key else noise
    save_file(tensors, folder / WEIGHTS)
    return folder
