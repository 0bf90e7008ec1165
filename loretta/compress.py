"""A LoRA adapter as LoRETTA_rep: each factor becomes a tensor train, and the error is reported per layer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loretta_kernels import TT, TTShape, tt_matrix
from loretta_kernels.start import stored_gains, with_gains
from loretta_kernels.svd import flat, tt_svd

from .config import LorettaRepConfig

PREFIX = "base_model.model."
CARRIED = {
    *("base_model_name_or_path", "revision", "task_type", "r", "lora_dropout", "bias", "target_modules"),
    *("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern"),
}
# What a rep adapter keeps by other means, and what matters before training only.
FOLDED = {"lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out"}
UNUSED = {"peft_type", "auto_mapping", "peft_version", "inference_mode", "megatron_core", "runtime_config"}
UNUSED |= {"ensure_weight_tying", "eva_config"}
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class CompressedLayer:
    """One layer: its name, the relative Frobenius error of the update, and parameters before and after."""

    name: str
    error: float
    before: int
    after: int


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did, layer by layer.

    Attributes:
        layers: in the order of their names.
        config: the config written.
    """

    layers: list[CompressedLayer]
    config: LorettaRepConfig

    @property
    def worst(self) -> float:
        """The largest error of a layer."""
        return max(layer.error for layer in self.layers)

    def __str__(self) -> str:
        """A table, one line per layer."""
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'error':>9}  {'LoRA':>10}  {'rep':>10}"]
        for layer in self.layers:
            lines.append(f"{layer.name:<{width}}  {layer.error:9.2e}  {layer.before:10,}  {layer.after:10,}")
        before, after = (sum(getattr(layer, name) for layer in self.layers) for name in ("before", "after"))
        lines.append(f"{'worst error, all parameters':<{width}}  {self.worst:9.2e}  {before:10,}  {after:10,}")
        return "\n".join(lines)


def compress_lora(folder: str | os.PathLike[str], tensor_rank: int, out: str | os.PathLike[str]) -> CompressionReport:
    """Write a LoRA adapter as a LoRETTA_rep adapter of at most ``tensor_rank`` on every bond.

    The factors of a layer are first rotated so that their inner dimension is that of the singular values of the update
    ``B·A``, largest first; then each is decomposed by TT-SVD. The relative error of the update, in the Frobenius norm,
    is reported per layer. Norms, heads and biases that the adapter trained are carried over as they are.

    Args:
        folder: has ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT's LoRA writes them.
        tensor_rank: no bond has a larger rank; where a bond cannot use so many, it has fewer.
        out: a new or empty folder, for the same two files.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        FileExistsError: ``out`` holds something.
        ValueError: the files are damaged, not a LoRA's, or the LoRA has options that LoRETTA_rep cannot represent
            (such as DoRA); the message lists them.

    Example:
        >>> report = compress_lora("runs/lora", 5, "runs/rep")
        >>> print(report.worst < 1)
        True

    Source: TT-SVD, Oseledets 2011; the format of LoRETTA_rep, Yang et al., arXiv 2402.11417.
    """
    if isinstance(tensor_rank, bool) or not isinstance(tensor_rank, int) or tensor_rank < 1:
        raise ValueError(f"tensor_rank must be an integer of at least 1, got {tensor_rank!r}")
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: holds something already; name a new folder")
    lora = _read_config(folder / "adapter_config.json")
    tensors = _read_weights(folder / SAFETENSORS_WEIGHTS_NAME)
    names = _layers(tensors, folder)

    layers: list[CompressedLayer] = []
    shapes: dict[str, TTShape] = {}
    for name in names:
        a, b = (tensors.pop(f"{PREFIX}{name}.lora_{factor}.weight") for factor in "AB")
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise ValueError(f"{folder}: {name} has factors of {tuple(a.shape)} and {tuple(b.shape)}; no linear LoRA")
        left, right = aligned_factors(a.T, b.T)
        trains = [compressed(left, tensor_rank, up=False), compressed(right, tensor_rank, up=True)]
        for factor, (cores, shape) in zip("AB", trains, strict=True):
            tensors[f"{PREFIX}{name}.loretta_rep_{factor}.cores"] = cores
            shapes[f"{shape.in_features}x{shape.out_features}"] = shape
        error = relative_error((a.T, b.T), tuple(tt_matrix(TT(cores.double(), shape)) for cores, shape in trains))
        after = sum(len(cores) for cores, _ in trains)
        layers.append(CompressedLayer(name, error, a.numel() + b.numel(), after))

    config = rep_config(lora, names, tensor_rank, shapes)
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        out / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(out))
    return CompressionReport(layers, config)


def aligned_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the product ``a·b`` whose inner index counts its singular values, largest first; in fp64."""
    q_a, r_a = torch.linalg.qr(a.double())
    q_b, r_b = torch.linalg.qr(b.double().T)
    u, s, vh = torch.linalg.svd(r_a @ r_b.T, full_matrices=False)
    left, right = q_a @ (u * s.sqrt()), (s.sqrt()[:, None] * vh) @ q_b.T
    missing = a.shape[1] - len(s)  # where the inner dimension exceeds a side
    return torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))


def compressed(matrix: Tensor, tensor_rank: int, up: bool) -> tuple[Tensor, TTShape]:
    """The flat cores, in fp32 and divided by their gains, and the shape of a train near the matrix."""
    modes = TTShape.for_matrix(matrix.shape[0], matrix.shape[1], 1)
    cores = tt_svd(matrix, modes.in_modes, modes.out_modes, tensor_rank)
    shape = TTShape(modes.in_modes, modes.out_modes, [core.shape[2] for core in cores[:-1]])
    shape = with_gains(shape, up)
    return flat([core / gain for core, gain in zip(cores, stored_gains(shape, up), strict=True)]), shape


def relative_error(exact: Iterable[Tensor], near: Iterable[Tensor]) -> float:
    """``|near - exact| / |exact|`` in the Frobenius norm of two products ``a·b``, neither of which is formed."""
    (a, b), (a2, b2) = ([factor.double() for factor in pair] for pair in (exact, near))
    difference = _norm(torch.cat([a, -a2], 1), torch.cat([b, b2]))
    norm = _norm(a, b)
    return (difference / norm).item() if norm else difference.item()


def _norm(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.norm(torch.linalg.qr(a).R @ torch.linalg.qr(b.T).R.T)


def rep_config(lora: LoraConfig, names: list[str], tensor_rank: int, shapes: dict[str, TTShape]) -> LorettaRepConfig:
    """The config of the rep adapter; rank-stabilised scalings become alphas of the same value."""
    alphas: dict[str, Any] = {"lora_alpha": lora.lora_alpha, "alpha_pattern": lora.alpha_pattern}
    if lora.use_rslora:
        alphas["lora_alpha"] = lora.lora_alpha * math.sqrt(lora.r)
        alphas["alpha_pattern"] = {}
        ranks, given = lora.rank_pattern or {}, lora.alpha_pattern or {}
        for name in names if ranks or given else ():
            r = ranks.get(get_pattern_key(list(ranks), name), lora.r)
            alpha = given.get(get_pattern_key(list(given), name), lora.lora_alpha)
            alphas["alpha_pattern"][re.escape(name)] = alpha * math.sqrt(r)
    return LorettaRepConfig(
        tensor_rank=tensor_rank,
        matrix_shapes={
            matrix: {"in_modes": [*shape.in_modes], "out_modes": [*shape.out_modes], "ranks": [*shape.ranks]}
            for matrix, shape in shapes.items()
        },
        train_layernorm=False,
        tensorize_head=False,
        inference_mode=True,
        **alphas,
        **{name: getattr(lora, name) for name in CARRIED},
    )


def _layers(tensors: dict[str, Tensor], folder: Path) -> list[str]:
    """The names of the adapted linears, sorted; an error for LoRA weights of any other kind."""
    found: dict[str, set[str]] = {}
    for key in tensors:
        if match := re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key):
            found.setdefault(match[1], set()).add(match[2])
        elif ".lora_" in key or not key.startswith(PREFIX):
            raise ValueError(f"{folder}: {key} is no part of a LoRA on linear layers, which is what can be compressed")
    if not found:
        raise ValueError(f"{folder}: no LoRA on a linear layer in it")
    if halves := sorted(name for name, factors in found.items() if len(factors) < 2):
        raise ValueError(f"{folder}: only one of the two factors of {', '.join(halves)}")
    return sorted(found)


def _read_config(path: Path) -> LoraConfig:
    """The LoRA's config, if LoRETTA_rep can represent all of it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a LoRA adapter has it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: a LoRA adapter is expected, this is {kind!r}")
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    refused = sorted(content.keys() - fields.keys())
    plain = LoraConfig()
    for name in content.keys() & fields.keys() - {*CARRIED, *FOLDED, *UNUSED, "init_lora_weights"}:
        if content[name] not in (getattr(plain, name), None, False, {}):
            refused.append(name)
    if content.get("init_lora_weights", True) not in INITS_THAT_KEEP_THE_BASE:
        refused.append("init_lora_weights")  # PiSSA and its kin change the base's own weights
    if refused:
        given = ", ".join(f"{name}={content[name]!r}" for name in sorted(refused))
        raise ValueError(f"{path}: LoRETTA_rep cannot represent {given}")
    content = {name: value for name, value in content.items() if name != "peft_type"}
    try:
        lora = LoraConfig(**content)
        lora.rank_pattern, lora.alpha_pattern = lora.rank_pattern or {}, lora.alpha_pattern or {}
        rep_config(lora, [], 1, {})  # raises for a value that no adapter can have
        return lora
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; only safetensors are read")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read; truncated or damaged? ({error})") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} is not a tensor of finite floating-point numbers")
    return tensors
