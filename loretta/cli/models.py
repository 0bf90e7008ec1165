"""Loads configurations, tokenizers and base models, and puts a method on them; errors are one line."""

import argparse
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.cli.distributed import device, engine
from loretta.cli.parser import METHOD_OPTIONS, method_dest
from loretta.cli.report import UserError, need, one_line, refusing
from loretta.quantised import keep_unpacked

AUTO_MODELS = {"causal_lm": AutoModelForCausalLM, "seq_cls": AutoModelForSequenceClassification}
CONFIGS: dict[str, type] = {"adp": LorettaAdpConfig, "rep": LorettaRepConfig}
HEADS = ["classifier", "score", "pooler", "classification_head", "pre_classifier"]  # trained, so never quantised


@dataclass(frozen=True)
class Base:
    """Which base model, and how it is read: all that is needed to load it again.

    Attributes:
        labels: the classes of a classifier; an empty list for a regression; None for those that the model has.
    """

    model: str
    gguf: str | None
    task: str
    dtype: str
    quant: str | None = None
    labels: list[str] | None = None

    def source(self) -> dict[str, Any]:
        """The arguments that name the model to from_pretrained."""
        return {"pretrained_model_name_or_path": self.model} | ({"gguf_file": self.gguf} if self.gguf else {})


def make_base(model: str, gguf: str | None, task: str, dtype: str | None, quant: str | None = None) -> Base:
    """The base that the options name; a local folder becomes absolute, so that a saved adapter can find it.

    Args:
        quant: "4bit", "8bit" or None, as it is loaded.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file() and gguf is None:
        path, gguf = path.parent, path.name
    if path.is_dir():
        if gguf is not None and not (path / gguf).is_file():
            raise UserError(f"{model}: no file {gguf} in it")
        if gguf is None and not (path / "config.json").is_file():
            found = [file.name for file in path.glob("*.gguf")]
            hint = f"; it has {', '.join(found)}: name one with --gguf" if found else ""
            raise UserError(f"{model}: no model in this folder (no config.json){hint}")
        model = str(path.resolve())
    elif path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") > 1 or not model:
        raise UserError(f"{model}: no such model folder")
    if gguf is not None and quant is not None:
        raise UserError(f"--load-in-{quant} does not go with a GGUF model, which is dequantised when it is loaded")
    if gguf is not None:
        need("gguf", "a GGUF model", "gguf")
    if quant is not None:
        need("bitsandbytes", f"--load-in-{quant}", "quant")
    return Base(model, gguf, task, dtype or ("float32" if device().type == "cpu" else "bfloat16"), quant)


@contextmanager
def explaining(name: str, what: str) -> Iterator[None]:
    """Turn what from_pretrained raises into one line that names what could not be loaded."""
    with refusing(f"{name}: the {what} cannot be loaded", Exception):  # a damaged file may raise anything
        try:
            yield
        except OSError as error:
            if Path(name).is_dir():
                raise
            raise UserError(
                f"{name}: no such folder, and no such {what} on the hub (or the hub cannot be reached)"
            ) from error


def load_config(base: Base) -> Any:
    """The model's configuration."""
    with explaining(base.model, "model"):
        return AutoConfig.from_pretrained(**base.source())


def load_tokenizer(base: Base) -> Any:
    """The tokenizer; where it has no padding token, the end token pads (padding has no loss and no attention)."""
    with explaining(base.model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**base.source())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{base.model}: its tokenizer has neither a padding nor an end token")
    if getattr(load_config(base), "type_vocab_size", 0) < 2:  # the model tells no two texts apart by their type
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def load_base(base: Base, tokenizer: Any) -> Any:
    """The base model on the device, in its dtype, with the task's head."""
    options: dict[str, Any] = {"dtype": getattr(torch, base.dtype)}
    if base.labels:
        names = dict(enumerate(base.labels))
        options |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    if base.labels is not None:
        problem = "single_label_classification" if base.labels else "regression"
        options |= {"num_labels": len(base.labels) or 1, "problem_type": problem, "ignore_mismatched_sizes": True}
    if base.gguf is not None and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    is_quantised = base.gguf is None and getattr(load_config(base), "quantization_config", None) is not None
    if base.quant is not None:
        if is_quantised:
            raise UserError(f"{base.model}: is quantised already; leave out --load-in-{base.quant}")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            **{f"load_in_{base.quant}": True},
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=base.dtype,
            llm_int8_skip_modules=HEADS if base.task == "seq_cls" else None,  # None: the output embedding
        )
    if base.quant is not None or is_quantised:
        options["device_map"] = {"": device()}  # such a model cannot be moved as a whole
    with explaining(base.model, "model"):
        model = AUTO_MODELS[base.task].from_pretrained(**base.source(), **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    keep_unpacked(model)
    if "device_map" not in options and engine() == "none":  # FSDP and DeepSpeed place the model themselves
        model = model.to(device())
    return model.eval()


def usable_seq_len(wanted: int | None, base: Base, tokenizer: Any) -> int:
    """The length asked for, or at most 256; an error where the model has fewer positions."""
    config = load_config(base).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # positions start after the padding's
        limit -= config.pad_token_id + 1
    limit = min(limit, tokenizer.model_max_length)
    if wanted is not None and wanted > limit:
        raise UserError(f"--seq-len {wanted} is more than the {limit} positions of {base.model}")
    return wanted or min(256, limit)


def skeleton(config: Any, task: str, name: str, **options: Any) -> Any:
    """The model of a transformers configuration on the meta device; `options` are from_config's, such as dtype."""
    with torch.device("meta"), refusing(f"{name}: no {task} model of this kind", ValueError):
        return AUTO_MODELS[task].from_config(config, **options)


def check_method_options(args: argparse.Namespace, methods: Collection[str]) -> None:
    """Refuse an option that none of the methods has ("lora" shares rep's)."""
    owned = {"adp", "rep"} & {"rep" if method == "lora" else method for method in methods}
    for flag, option in METHOD_OPTIONS.items():
        if getattr(args, method_dest(flag)) is not None and not owned & option.keys():
            owner = "adp" if "adp" in option else "rep"
            raise UserError(f"{flag} belongs to --method {owner}, not {' '.join(methods)}")


def method_config(args: argparse.Namespace, method: str, task: str) -> Any:
    """The configuration of a method, from its options; an error names the option."""
    fields = {option[method]: flag for flag, option in METHOD_OPTIONS.items() if method in option}
    values = {field: getattr(args, method_dest(flag)) for field, flag in fields.items()}
    given = {field: value for field, value in values.items() if value is not None}
    if given.get("target_modules") == ["all-linear"]:
        given["target_modules"] = "all-linear"
    if given.get("init_weights") == "identity":
        given["init_weights"] = True
    try:
        return CONFIGS[method](task_type=task.upper(), **given)
    except (ValueError, TypeError) as error:
        flags = [f" ({fields[field]})" for field in given if field in str(error)]
        raise UserError("".join([one_line(error), *flags[:1]])) from error


def wrapped(model: Any, config: Any, **options: Any) -> Any:
    """The model with its adapter; `options` are get_peft_model's."""
    with refusing("the method does not fit this model", TypeError, ValueError):
        # DeepSpeed takes one dtype for all that is trained, the base's, and keeps a float32 copy itself
        return get_peft_model(model, config, **{"autocast_adapter_dtype": engine() != "deepspeed"} | options)


@contextmanager
def base_only(model: Any) -> Iterator[None]:
    """Run the model as its base inside.

    PEFT's own switch also changes what requires gradients, which an engine may already have read.
    """
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Refuse to pack rows if the second of two rows in one sequence has other logits after another first row."""
    positions = torch.tensor([[0, 1, 0, 1]], device=model.device)
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 3, 4]], device=model.device)
    with refusing("--packing does not go with this model", TypeError):
        one, other = (model.eval()(input_ids=row[None], position_ids=positions).logits[0, 2:] for row in ids)
    if not torch.allclose(one, other):
        raise UserError("--packing does not go with this model: it lets a row see those before it")
