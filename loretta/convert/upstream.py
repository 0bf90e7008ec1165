"""Adapters of the released package (PyPI loretta 0.1.0) as adapters of this one, with the same function."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from loretta_kernels import TTShape
from loretta_kernels.svd import flat

from ..config import LorettaAdpConfig, LorettaRepConfig, _LorettaConfig
from ..layer import train_shape
from ..norms import is_feature_norm
from ..targets import FAMILIES
from .trains import normal_form
from .upstream_files import PREFIX, UpstreamAdapter, read_upstream

AUTO_MODELS = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
NAMES = {
    "adapter_down": "loretta_adp_down",
    "adapter_up": "loretta_adp_up",
    "adapter_scaling": "loretta_adp_scaling.value",
    "lora_A": "loretta_rep_A",
    "lora_B": "loretta_rep_B",
}
CARRIED = {
    "adp": "bottleneck_size non_linearity adapter_dropout use_parallel_adapter use_adapterp scaling tensorized",
    "rep": "r lora_alpha lora_dropout merge_weights",
}
# Two fields are left behind: enable_lora, which the released package ignores, and fan_in_fan_out, which follows from
# the layer.
CARRIED_BY_BOTH = "task_type target_modules tensor_rank bias modules_to_save"
HEADS = ("score", "classifier", "classifier.out_proj", "classification_head.out_proj")


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        method: "adp" or "rep".
        config: the config written.
        trains: the shapes of the trains that differ from this package's defaults, by matrix, such as ``"64x4096"``.
        from_base: parameters that the released package trained but did not save, left to the base model.
        num_labels: how many classes the head has, or None for a model without one.
    """

    method: str
    config: _LorettaConfig
    trains: dict[str, TTShape]
    from_base: list[str]
    num_labels: int | None


class MissingParameters(ValueError):
    """The folder lacks what was trained; ``names`` lists it."""

    def __init__(self, folder: Path, names: list[str]):
        self.names = names
        super().__init__(
            f"{folder}: trained, but not saved by the released loretta: {', '.join(names)}. Save them where the model "
            "was trained (docs/from-upstream.md says how), or take the base model's own with missing='base'"
        )


def convert_upstream(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | PretrainedConfig | None = None,
    *,
    missing: str = "refuse",
) -> Converted:
    """Write the adapter of a folder of the released package as one that ``PeftModel.from_pretrained`` loads.

    Trains are brought to the normal form, exact to rounding. Every tensor of the folder ends up in the result, and the
    result is checked against the base model's architecture: nothing is left out, nothing is made up.

    Args:
        folder: has ``adapter_config.json`` and ``adapter_model.bin``.
        out: a new or empty folder, for ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the model that was adapted, as id, folder or configuration (no weights are read); None takes the name
            that the adapter's config gives.
        missing: "refuse", or "base": what was trained but not saved (norms, DeBERTa's pooler) is the base model's own.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        MissingParameters: with ``missing="refuse"``; lists what was trained but not saved.
        FileExistsError: ``out`` holds something.
        ValueError: the files are damaged, hostile, or do not fit the base model; the message says where.
    """
    if missing not in ("refuse", "base"):
        raise ValueError(f"missing must be 'refuse' or 'base', got {missing!r}")
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: holds something already; name a new folder")
    adapter = read_upstream(folder)
    model, name = _skeleton(adapter, base)
    lost = _trained_but_not_saved(adapter, model)
    if lost and missing == "refuse":
        raise MissingParameters(folder, lost)

    shapes, tensors = _converted_tensors(adapter)
    config = _config(adapter, model, shapes)
    trains = {matrix: TTShape(**train) for matrix, train in (config.matrix_shapes or {}).items()}
    tensors = _placed(tensors, model, config, folder)
    config.inference_mode, config.base_model_name_or_path = True, name
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(out))
    return Converted(adapter.method, config, trains, lost, _num_labels(adapter))


def _skeleton(adapter: UpstreamAdapter, base: str | PretrainedConfig | None) -> tuple[nn.Module, str]:
    """The base model on the meta device, and its name."""
    task = adapter.config.get("task_type")
    if task not in AUTO_MODELS:
        raise ValueError(f"task_type is {task!r}; adapters of {', '.join(AUTO_MODELS)} can be converted")
    name = base if isinstance(base, str) else adapter.config.get("base_model_name_or_path")
    if isinstance(base, PretrainedConfig):
        config, name = base, name or base.name_or_path
    elif name:
        config = AutoConfig.from_pretrained(name)
    else:
        raise ValueError("the adapter does not say what its base model is; name it")
    if num_labels := _num_labels(adapter):
        config = type(config).from_dict({**config.to_dict(), "num_labels": num_labels})
    with torch.device("meta"):
        return AUTO_MODELS[task].from_config(config), str(name)


def _num_labels(adapter: UpstreamAdapter) -> int | None:
    """How many classes the head in the folder has."""
    return next((len(adapter.plain[f"{head}.weight"]) for head in HEADS if f"{head}.weight" in adapter.plain), None)


def _trained_but_not_saved(adapter: UpstreamAdapter, model: nn.Module) -> list[str]:
    """Parameters that the released package trains on this model and whose values the folder does not have.

    It trains what is called LayerNorm (BERT and its kin; not Llama's or OPT's norms) and, for classification, replaces
    the head's dense layer by a train; it saves neither the former nor, outside the classifier, the latter.
    """
    norms = [name for name, _ in model.named_parameters() if "LayerNorm" in name and name not in adapter.plain]
    head = _tensorised_head(adapter, model)
    return norms + ([head] if head and head not in adapter.trains else [])


def _tensorised_head(adapter: UpstreamAdapter, model: nn.Module) -> str | None:
    family = FAMILIES.get(getattr(model.config, "model_type", ""))
    return family.head if family and adapter.config["task_type"] == "SEQ_CLS" else None


def _converted_tensors(adapter: UpstreamAdapter) -> tuple[dict[str, TTShape], dict[str, Tensor]]:
    """The shape of every train by its module's new name, and every tensor by its new name."""
    shapes, tensors = {}, {}
    for module, cores in adapter.trains.items():
        sizes = _sizes(adapter, module, cores)
        try:
            cores, shape = normal_form(cores, *sizes)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        shapes[_renamed(module)] = shape
        tensors[f"{_renamed(module)}.cores"] = flat(cores)
    for module, bias in adapter.biases.items():
        tensors[f"{_renamed(module)}.bias"] = bias.float()
    for name, tensor in adapter.plain.items():
        tensors[_renamed(name)] = tensor
        module, _, leaf = _renamed(name).rpartition(".")
        if leaf == "weight" and module.endswith(("loretta_adp_down", "loretta_adp_up")):
            tensors.setdefault(f"{module}.bias", tensor.new_zeros(len(tensor)))  # its dense projections have none
    return shapes, tensors


def _sizes(adapter: UpstreamAdapter, module: str, cores: list[Tensor]) -> tuple[int, int]:
    """Input and output size of the matrix that a train is."""
    entries = 1
    for core in cores:
        entries *= core.shape[1] if core.dim() == 3 else 0
    bias = adapter.biases.get(module)
    kind = module.rpartition(".")[2]
    width = adapter.config.get("r" if kind in ("lora_A", "lora_B") else "bottleneck_size")
    known = (
        width if kind in ("lora_A", "lora_B", "adapter_down", "adapter_up") else len(bias) if bias is not None else 0
    )
    if not isinstance(known, int) or known < 1 or entries % known:
        raise ValueError(f"{module}: a train of {entries} entries is no matrix with a side of {known}")
    return (known, entries // known) if kind in ("lora_B", "adapter_up") else (entries // known, known)


def _renamed(name: str) -> str:
    return ".".join(NAMES.get(part, part) for part in name.split("."))


def _config(adapter: UpstreamAdapter, model: nn.Module, shapes: dict[str, TTShape]) -> _LorettaConfig:
    """Our config: what the released one says, and the trains that our defaults would shape otherwise."""
    fields = {name: adapter.config[name] for name in f"{CARRIED[adapter.method]} {CARRIED_BY_BOTH}".split()
              if name in adapter.config}  # fmt: skip
    head = _tensorised_head(adapter, model)
    fields["tensorize_head"] = head is not None and head in adapter.trains
    fields["train_layernorm"] = any(
        is_feature_norm(module) and f"{name}.weight" in adapter.plain for name, module in model.named_modules()
    )
    make: Any = LorettaAdpConfig if adapter.method == "adp" else LorettaRepConfig
    config: _LorettaConfig = make(core_gain="paper", **fields)

    explicit: dict[str, TTShape] = {}
    for module, shape in shapes.items():
        if explicit.setdefault(f"{shape.in_features}x{shape.out_features}", shape) != shape:
            raise ValueError(f"{module}: its train {shape} differs from another of the same matrix")
    explicit = {
        matrix: shape
        for matrix, shape in explicit.items()
        if shape != train_shape(config, shape.in_features, shape.out_features, config.tensor_rank)
    }
    if explicit:
        config.matrix_shapes = {
            matrix: {"in_modes": [*shape.in_modes], "out_modes": [*shape.out_modes], "ranks": [*shape.ranks]}
            for matrix, shape in explicit.items()
        }
    adapted = {module.rpartition(".loretta_")[0] for module in map(_renamed, [*adapter.trains, *adapter.plain])}
    adapted -= {""}
    if config.target_modules is None:
        config.target_modules = adapted
    try:
        targeted = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
    except re.error as error:
        raise ValueError(f"target_modules {config.target_modules!r} is no regular expression: {error}") from None
    if adapted != targeted:
        config.target_modules = adapted
    return config


def _placed(tensors: dict[str, Tensor], model: nn.Module, config: _LorettaConfig, folder: Path) -> dict[str, Tensor]:
    """The tensors under the keys that the adapter on this model has; all of them, and no others."""
    with torch.device("meta"):
        wrapped = get_peft_model(model, config)
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    placed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        keys = (f"{PREFIX}{name}", f"{PREFIX}{module}.base_layer.{leaf}")
        key = next((key for key in keys if key in wanted), None)
        if key is None:
            raise ValueError(f"{folder}: {name} has no place in this base model")
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{folder}: {name} has the shape {tuple(tensor.shape)}, on this base model it is "
                f"{tuple(wanted[key].shape)}"
            )
        placed[key] = tensor.contiguous()
    if absent := sorted(wanted.keys() - placed.keys()):
        names = ", ".join(key.removeprefix(PREFIX) for key in absent)
        raise ValueError(f"{folder}: has no value for {names}, which this adapter has on this base model")
    resolved = wrapped.peft_config["default"]
    assert isinstance(resolved, _LorettaConfig)
    config.target_modules, config.modules_to_save = resolved.target_modules, resolved.modules_to_save
    return placed
