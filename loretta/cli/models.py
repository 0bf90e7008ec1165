"""Loads configurations, tokenizers, base models and adapters, and says in one line what cannot be loaded."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loretta.cli.allocator import keep_freed_memory
from loretta.cli.distributed import accelerator, engine
from loretta.cli.errors import UserError, one_line
from loretta.quantised import keep_unpacked

AUTO_MODELS = {"causal_lm": AutoModelForCausalLM, "seq_cls": AutoModelForSequenceClassification}
HEADS = ("classifier", "score", "pooler", "classification_head", "pre_classifier")  # trained, so never quantised


@dataclass(frozen=True)
class Base:
    """Which base model, and how it is read: all that is needed to load it again."""

    model: str
    gguf: str | None
    task: str
    dtype: str
    quant: str | None = None
    labels: list[str] | None = None

    def with_labels(self, labels: list[str]) -> "Base":
        return replace(self, labels=labels)

    def source(self) -> dict[str, Any]:
        """The arguments that name the model to from_pretrained."""
        return {"pretrained_model_name_or_path": self.model} | ({"gguf_file": self.gguf} if self.gguf else {})


def device() -> torch.device:
    """The accelerator that the Trainer will use, or the CPU."""
    return accelerator() or torch.device("cpu")


def make_base(model: str, gguf: str | None, task: str, dtype: str | None, quant: str | None = None) -> Base:
    """The base that the options name; a local folder becomes absolute, so that an adapter finds it from anywhere.

    Args:
        quant: "4bit", "8bit" or None, as it is loaded.

    Raises:
        UserError: where no such folder or file exists and the name is no hub id, and where it cannot be quantised.
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
    if gguf is not None:
        if quant is not None:
            raise UserError(f"--load-in-{quant} does not go with a GGUF model, which is dequantised when it is loaded")
        _need("gguf", "a GGUF model", "gguf")
    if quant is not None:
        _need("bitsandbytes", f"--load-in-{quant}", "quant")
    return Base(model, gguf, task, dtype or ("float32" if device().type == "cpu" else "bfloat16"), quant)


def load_config(base: Base) -> Any:
    """The model's configuration."""
    with Explaining(base.model, "model"):
        return AutoConfig.from_pretrained(**base.source())


def load_tokenizer(base: Base) -> Any:
    """The tokenizer; where it has no padding token, the end token pads (padding has no loss and no attention)."""
    with Explaining(base.model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**base.source())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{base.model}: its tokenizer has neither a padding nor an end token")
    return tokenizer


def load_base(base: Base, tokenizer: Any) -> Any:
    """The base model on the device, in its dtype, with the task's head; on a CPU the process keeps freed memory."""
    if device().type == "cpu":
        keep_freed_memory()
    options: dict[str, Any] = {"dtype": getattr(torch, base.dtype)}
    if base.labels is not None:
        names = dict(enumerate(base.labels))
        options |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        options |= {"num_labels": len(names), "ignore_mismatched_sizes": True}
    if base.gguf is not None and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    is_quantised = base.gguf is None and getattr(load_config(base), "quantization_config", None) is not None
    if base.quant is not None:
        if is_quantised:
            raise UserError(f"{base.model}: is quantised already; leave out --load-in-{base.quant}")
        options["quantization_config"] = _bitsandbytes(base)
    if base.quant is not None or is_quantised:
        options["device_map"] = {"": device()}  # such a model cannot be moved as a whole
    with Explaining(base.model, "model"):
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


class Explaining:
    """Turns what from_pretrained raises into one line that names what could not be loaded."""

    def __init__(self, name: str, what: str):
        self.name, self.what = name, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        if isinstance(error, OSError) and not Path(self.name).is_dir():
            raise UserError(
                f"{self.name}: no such folder, and no such {self.what} on the hub (or the hub cannot be reached)"
            ) from error
        raise UserError(f"{self.name}: the {self.what} cannot be loaded: {one_line(error)[:300]}") from error


def _bitsandbytes(base: Base) -> transformers.BitsAndBytesConfig:
    """What --load-in-4bit and --load-in-8bit stand for."""
    skipped = list(HEADS) if base.task == "seq_cls" else None  # None: the output embedding
    if base.quant == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=base.dtype,
        llm_int8_skip_modules=skipped,
    )


def _need(package: str, what: str, extra: str) -> None:
    """Raise unless transformers will find the package."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}: pip install 'loretta-tt[{extra}]'")
