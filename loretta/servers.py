"""What the LoRA loaders of vLLM, SGLang and llama.cpp take; all that they would ignore or misread is refused here.

Each rule was read in the server's source; docs/serve.md says where.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import _LorettaConfig
from .layer import LorettaLayer

SERVERS = ("vllm", "sglang", "llama.cpp")
VLLM_MAX_RANK = 512


def check_servable(
    server: str,
    model: nn.Module,
    config: _LorettaConfig,
    layers: Mapping[str, LorettaLayer],
    rank: int,
    has_bias: bool = False,
) -> None:
    """Raise if the server would not compute what the model does.

    Args:
        server: one of ``SERVERS``.
        model: the base model around which the layers lie.
        config: of the adapter, resolved.
        layers: the adapted layers by their names in the base model.
        rank: the one rank of the export.
        has_bias: whether the adapter adds a bias to an output.

    Raises:
        ValueError: with every reason, and the way out of each.
    """
    reasons = list(_of_any_server(model, config, layers))
    if has_bias:
        reasons.append("it takes no bias in a LoRA, and this adapter's trains have biases: merge the adapter")
    if server == "vllm" and rank > VLLM_MAX_RANK:
        reasons.append(f"its --max-lora-rank is at most {VLLM_MAX_RANK}, and this adapter has rank {rank}")
    if server == "sglang":
        reasons += _of_sglang(layers)
    if reasons:
        raise ValueError(f"{server} cannot serve this adapter as a LoRA: " + "; ".join(reasons))


def _of_any_server(model: nn.Module, config: _LorettaConfig, layers: Mapping[str, LorettaLayer]) -> Iterator[str]:
    if config.modules_to_save:
        yield (
            f"it takes no modules that were trained whole ({_named(config.modules_to_save)}): train without the norms "
            "(train_layernorm=False, --no-train-layernorm) and without a new head, or merge the adapter"
        )
    if config.bias != "none":
        yield f"it takes no trained biases: train with bias='none', not {config.bias!r}, or merge the adapter"
    if transposed := [name for name, layer in layers.items() if isinstance(layer.get_base_layer(), Conv1D)]:
        yield f"{_named(transposed)} have a weight [in, out] (Conv1D), which it does not expect: merge the adapter"
    embeddings, head = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    for name, layer in layers.items():
        if layer is head and layer.get_base_layer().weight is getattr(embeddings, "weight", None):
            yield f"{name} shares its weight with the embeddings: train with exclude_modules=[{name!r}]"


def _of_sglang(layers: Mapping[str, LorettaLayer]) -> Iterator[str]:
    """SGLang sorts weights by the number after ``layers.``, then by the last part of a module's name."""
    numbered: dict[str, Counter[str]] = defaultdict(Counter)
    unnumbered = []
    for name in layers:
        if number := re.search(r"layers\.(\d+)\.", name):
            numbered[number[1]][name.rpartition(".")[2]] += 1
        elif name != "lm_head":
            unnumbered.append(name)
    if unnumbered:
        yield f"it ignores {_named(unnumbered)}, whose names have no 'layers.' with a number: merge the adapter"
    if twice := sorted({leaf for leaves in numbered.values() for leaf, count in leaves.items() if count > 1}):
        yield f"it keeps one {_named(twice)} for each layer number, and here are several: merge the adapter"
    if any(
        leaves.keys() & {"q_proj", "k_proj", "v_proj"} and not {"q_proj", "v_proj"} <= leaves.keys()
        for leaves in numbered.values()
    ):
        yield "it stacks q_proj, k_proj and v_proj, and needs q_proj and v_proj in every layer that has one of them"
    if any("up_proj" in leaves and "gate_proj" not in leaves for leaves in numbered.values()):
        yield "it stacks gate_proj and up_proj, and needs gate_proj in every layer that has up_proj"


def _named(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
