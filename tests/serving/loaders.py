"""What the LoRA loaders of three servers make of a folder: each gives the change of every linear's weight.

Written from reading vLLM (lora/peft_helper.py, lora_model.py, lora_weights.py), SGLang (srt/lora/lora_config.py,
lora.py, mem_pool.py) and llama.cpp (convert_lora_to_gguf.py, src/llama-adapter.cpp, llama-adapter.h). Config fields
that a loader does not read are not read here either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Deltas = dict[str, Tensor]
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
STACK_OF = {part: stack for stack, parts in STACKED.items() for part in parts}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config as JSON and the tensors."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  a handle, no dict
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def vllm(folder: Path) -> Deltas:
    """PEFTHelper keeps r, lora_alpha, bias, modules_to_save and use_rslora; one factor scales every B."""
    config, tensors = read(folder)
    assert not config["modules_to_save"], "vLLM only supports modules_to_save being None."
    assert config["bias"] == "none", "Adapter bias is not supported."
    assert not config["use_dora"]
    assert config["r"] <= 512, "the largest --max-lora-rank"
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        *module, kind, weight = name.removeprefix("base_model.model.").split(".")
        assert weight == "weight", f"{name} is unsupported LoRA weight"
        assert kind in ("lora_A", "lora_B"), f"{name} is unsupported LoRA weight"
        # set_lora copies into zeros of the largest rank, so that a smaller one is no error
        assert tensor.shape[0 if kind == "lora_A" else 1] <= config["r"]
        factors.setdefault(".".join(module), {})[kind] = tensor
    return {name: scale * pair["lora_B"] @ pair["lora_A"] for name, pair in factors.items()}


def sglang(folder: Path) -> Deltas:
    """Weights are sorted by layer number, stacked by fixed names, and must have the rank of the config."""
    config, tensors = read(folder)
    assert not isinstance(config["target_modules"], str), "Only 'all' or 'all-linear' can be used as the string"
    targets = {STACK_OF.get(leaf, leaf) for leaf in (name.split(".")[-1] for name in config["target_modules"])}
    scale = config["lora_alpha"] / config["r"]
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if number := re.search(r"layers\.(\d+)\.", name):
            layers.setdefault(int(number[1]), {})[name] = tensor  # all others are ignored
    deltas: Deltas = {}
    for layer in layers.values():
        buffers: dict[tuple[str, str], tuple[str, list[Tensor]]] = {}
        for name in list(layer):
            if "q_proj" in name:
                k, v = name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj")
                parts = [layer.pop(name), layer.pop(k, torch.zeros_like(layer[v])), layer.pop(v)]
                put(buffers, targets, name.replace("q_proj", "qkv_proj"), parts)
            elif "gate_proj" in name:
                up = name.replace("gate_proj", "up_proj")
                parts = [layer[name], layer.pop(up, torch.zeros_like(layer[name]))]
                put(buffers, targets, name.replace("gate_proj", "gate_up_proj"), parts)
                del layer[name]
        for name, tensor in layer.items():
            put(buffers, targets, name, [tensor])
        for (target, factor), (name, b_parts) in buffers.items():
            if factor == "lora_A":
                continue
            a_parts = buffers[target, "lora_A"][1]
            assert sum(map(len, a_parts)) == len(a_parts) * config["r"], "buffer and weight differ in shape"
            module = name.split(".lora_")[0].removeprefix("base_model.model.")
            parts = STACKED[target] if len(b_parts) > 1 else (target,)
            for part, a, b in zip(parts, a_parts, b_parts, strict=True):
                deltas[module.replace(target, part)] = scale * b @ a
    return deltas


def put(buffers: dict[tuple[str, str], tuple[str, list[Tensor]]], targets: set[str], name: str, parts: Any) -> None:
    """A weight goes to the longest target that its name contains; a second one takes the place of the first."""
    found = [target for target in targets if target in name]
    assert found, f"Cannot find target module name for {name} in {targets}"
    buffers[max(found, key=len), "lora_A" if "lora_A" in name else "lora_B"] = (name, parts)


def llama_cpp(folder: Path) -> Deltas:
    """The converter passes norms on, which the loader skips; alpha is one number, the rank that of each B."""
    config, tensors = read(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not (match := re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name.replace("base_model.model.", ""))):
            assert "_layernorm" in name or ".norm" in name, f"Unexpected name '{name}'"
            continue
        factors.setdefault(match[1], {})[match[2]] = tensor
    alpha = float(config["lora_alpha"])
    return {
        name: (alpha / pair["lora_B"].shape[1] if alpha else 1.0) * pair["lora_B"] @ pair["lora_A"]
        for name, pair in factors.items()
    }


LOADERS: dict[str, Callable[[Path], Deltas]] = {"vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp}
