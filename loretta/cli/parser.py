"""The parser of all commands. It imports nothing that takes time: help and wrong options are answered at once."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

TASKS = ("causal_lm", "seq_cls")
METHODS = ("adp", "rep")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # the short name -> the one in records
QUANTS = {"4bit": "4 bits (NF4, its scales quantised too)", "8bit": "8 bits"}  # name in records -> in the help
FIELDS = ("text", "text_pair", "label", "prompt", "completion", "messages")
PRESETS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("presets.json").read_text("utf-8"))


def _read_help() -> dict[str, tuple[str, str]]:
    """The sections of help.txt by their command: the usage, and a summary, a description and an epilog below it."""
    text = Path(__file__).with_name("help.txt").read_text("utf-8").replace("<presets>", ", ".join(PRESETS))
    sections = (section.partition("\n") for section in text.split("== loretta ")[1:])
    return {usage.split()[0]: (usage, body.strip()) for usage, _, body in sections}


HELP = _read_help()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help is the section of help.txt on its command."""

    def __init__(self, prog: str):
        usage, body = HELP[prog.partition(" ")[2] or "COMMAND"]
        _, description, epilog = body.replace("<data formats>", HELP["formats"][1]).split("\n\n", 2)
        super().__init__(
            prog,
            None if usage.startswith("COMMAND") else f"loretta {usage}",
            description,
            epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Number:
    """Reads a number, and says what is accepted where it is none."""

    kind: type
    accepts: Callable[[Any], bool]
    wanted: str

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if self.kind is int and value is not None and value >= 2**32:
            raise argparse.ArgumentTypeError(f"must be below 4294967296, not {text!r}")
        if value is None or not self.accepts(value):
            raise argparse.ArgumentTypeError(f"must be {self.wanted}, not {text!r}")
        return value


NATURAL = Number(int, lambda value: value >= 0, "a whole number of at least 0")
POSITIVE_INT = Number(int, lambda value: value >= 1, "a whole number of at least 1")
AT_LEAST_TWO = Number(int, lambda value: value >= 2, "a whole number of at least 2")
THREADS = Number(int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")
NOT_NEGATIVE = Number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
POSITIVE = Number(float, lambda value: 0 < value < math.inf, "a number above 0")
SHARE = Number(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
FRACTION = Number(float, lambda value: 0 < value < 1, "a number between 0 and 1")


def _number(group: Any, flag: str, kind: Number, text: str, default: float | None = None, **options: Any) -> None:
    """Add an option that takes a number; the help shows its default where it has one."""
    shown = "" if default is None else f" (default {default:g})"
    metavar = "N" if kind.kind is int else "X"
    group.add_argument(flag, type=kind, default=default, help=text + shown, **{"metavar": metavar} | options)


def _number_or_name(text: str) -> float | str:
    """A number where it is one; the configuration judges the rest."""
    try:
        return float(text)
    except ValueError:
        return text


def _column(text: str) -> tuple[str, str]:
    """NAME=COLUMN as a pair."""
    name, _, column = text.partition("=")
    if name not in FIELDS or not column:
        raise argparse.ArgumentTypeError(f"must be NAME=COLUMN with NAME one of {', '.join(FIELDS)}, not {text!r}")
    return name, column


@dataclass(frozen=True)
class MethodOption:
    """A hyper-parameter: the field that it sets in each method's configuration, its help, and how argparse reads it."""

    flag: str
    adp: str | None
    rep: str | None
    text: str
    reading: dict[str, Any]

    @property
    def dest(self) -> str:
        return "method_" + self.flag.strip("-").replace("-", "_")

    def field(self, method: str) -> str | None:
        """The field in the configuration of a method ("lora" shares rep's options), or None."""
        return {"adp": self.adp, "rep": self.rep, "lora": self.rep}.get(method)


_ON, _OFF = {"action": "store_const", "const": True}, {"action": "store_const", "const": False}
_INT, _FLOAT, _NAME = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}, {"metavar": "NAME"}
_NAMES, _INTS = {"nargs": "+", "metavar": "NAME"}, {"nargs": "+", "type": int, "metavar": "N"}
_SCALING = {"type": _number_or_name, "metavar": "X"}
_STARTS = {"choices": ("identity", "gaussian")}
_ACTIVATIONS = "adp: relu, gelu, gelu_tanh, silu, tanh or identity (default relu)"
_TARGETS = "ends of the names of the modules to adapt, or: all-linear (default: by the model's family)"
_CORES = "how the trains are held: to be trained at the rates of a LoRA, or as in the paper (default rate)"
_BIASES = "biases of the base that are trained: none, all, adp: adapter_only, rep: lora_only (default none)"
METHOD_OPTIONS = tuple(
    MethodOption(*option)
    for option in (
        ("--rank", "tensor_rank", "tensor_rank", "rank of every bond of the tensor trains (default 5)", _INT),
        ("--bottleneck", "bottleneck_size", None, "adp: width of the bottleneck (default 64)", _INT),
        ("--activation", "non_linearity", None, _ACTIVATIONS, _NAME),
        ("--scaling", "scaling", None, "adp: factor of the adapter, or: learned (default 1.0)", _SCALING),
        ("--parallel", "use_parallel_adapter", None, "adp: adapters beside the linears, not in series", _ON),
        ("--adapterp", "use_adapterp", None, "adp: adapters on the output of the feed-forward blocks only", _ON),
        ("--dense", "tensorized", None, "adp: plain matrices in the place of tensor trains", _OFF),
        ("--r", None, "r", "rep: inner dimension of the two factors (default 8)", _INT),
        ("--alpha", None, "lora_alpha", "rep: the update is scaled by alpha / r (default 16)", _FLOAT),
        ("--dropout", "adapter_dropout", "lora_dropout", "on the adapter's input (default 0.0, rep: 0.05)", _FLOAT),
        ("--target-modules", "target_modules", "target_modules", _TARGETS, _NAMES),
        ("--layers", "layers_to_transform", "layers_to_transform", "indices of the layers (default: all)", _INTS),
        ("--modules-to-save", "modules_to_save", "modules_to_save", "further modules to train and save whole", _NAMES),
        ("--bias", "bias", "bias", _BIASES, {"metavar": "WHICH"}),
        ("--init", "init_weights", "init_weights", "start as the base, or as in the paper (default identity)", _STARTS),
        ("--core-gain", "core_gain", "core_gain", _CORES, {"choices": ("rate", "paper")}),
        ("--no-train-layernorm", "train_layernorm", "train_layernorm", "leave the base's norms as they are", _OFF),
        ("--no-tensorize-head", "tensorize_head", "tensorize_head", "seq_cls: keep the head's dense layer dense", _OFF),
    )
)


def make_parser() -> Parser:
    """The parser of all commands; `command` in its result names the module of `loretta.cli` that runs it."""
    parser = Parser("loretta")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in (_finetune, _eval, _params, _plan, _export, _merge, _convert, _compress, _check):
        name = add.__name__.strip("_")
        add(commands.add_parser(name, help=HELP[name][1].partition("\n")[0]))
    return parser


def _finetune(parser: Parser) -> None:
    _add_model(parser, required=True)
    data = _add_data(parser, task="causal_lm")
    _number(data, "--seq-len", AT_LEAST_TWO, "tokens a block or row (default 256)")
    held_out = data.add_mutually_exclusive_group()
    text = "held-out data (default: part of --data)"
    held_out.add_argument("--eval-data", nargs="+", metavar="FILE_OR_ID", help=text)
    _number(held_out, "--eval-fraction", FRACTION, "part of --data to hold out", 0.05)
    _number(data, "--eval-limit", POSITIVE_INT, "evaluate on the first N blocks or rows only")
    _add_methods(parser, **_ONE_METHOD)
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    _number(length, "--steps", POSITIVE_INT, "optimiser steps (default: by --epochs)")
    _number(length, "--epochs", POSITIVE, "passes over the data", 1.0)
    _number(training, "--lr", POSITIVE, "learning rate, as for a LoRA (with --core-gain paper: about 1e-2)", 3e-3)
    _number(training, "--batch-size", POSITIVE_INT, "rows a batch, in each process", 8)
    _number(training, "--grad-accum", POSITIVE_INT, "batches a step", 1)
    _number(training, "--weight-decay", NOT_NEGATIVE, "of the optimiser", 0.0)
    text = "any of transformers' optimisers: adafactor, adamw_8bit, lion_8bit, sgd, ... (default adamw_torch)"
    training.add_argument("--optim", default="adamw_torch", metavar="NAME", help=text)
    schedules = ("linear", "cosine", "constant")
    training.add_argument("--lr-schedule", choices=schedules, default="linear", help="default: linear")
    _number(training, "--warmup", SHARE, "part of the steps that raise the rate", 0.1)
    text = "no padding: the rows of a batch follow one another, and none sees another"
    training.add_argument("--packing", action="store_true", help=text)
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    _number(training, "--seed", NATURAL, "of everything random", 0)
    output = parser.add_argument_group("output")
    text = "folder of the adapter; a former run's is replaced"
    output.add_argument("--output", required=True, metavar="DIR", help=text)
    _number(output, "--save-steps", NATURAL, "steps between checkpoints, 0: none", 100)
    _number(output, "--eval-steps", POSITIVE_INT, "steps between evaluations (default: before and after only)")
    text = "where losses are logged: tensorboard (in OUTPUT/logs), wandb, or another that transformers knows"
    output.add_argument("--report-to", nargs="+", default=[], metavar="NAME", help=text)
    text = "go on from the newest complete checkpoint of the same run"
    output.add_argument("--resume", action="store_true", help=text)
    output.add_argument("--plot", action="store_true", help="draw the loss curve into OUTPUT/loss.png")
    _add_running(parser, threads=True)


def _eval(parser: Parser) -> None:
    _add_model(parser, required=False)
    parser.add_argument("--adapter", metavar="DIR", help="folder of a LoRETTA or plain LoRA adapter")
    data = _add_data(parser, task=None)
    _number(data, "--seq-len", AT_LEAST_TWO, "default: as trained, else 256")
    _number(data, "--batch-size", POSITIVE_INT, "default: as trained, else 8")
    _number(data, "--eval-limit", POSITIVE_INT, "the first N blocks or rows only")
    _add_running(parser, threads=True)


def _params(parser: Parser) -> None:
    _add_configuration(parser)
    _add_methods(parser, **_ONE_METHOD)
    _add_running(parser)


def _plan(parser: Parser) -> None:
    group = _add_configuration(parser)
    _add_dtype(group, "bfloat16", "bfloat16")
    quants, text = ("none", "8bit", "4bit", "4bit-double"), "bitsandbytes base; --load-in-4bit makes 4bit-double"
    group.add_argument("--quant", choices=quants, default="none", help=f"{text} (default none)")
    group.add_argument("--attention", choices=("sdpa", "eager"), help="default: what transformers takes")
    step = parser.add_argument_group("step")
    _number(step, "--seq", AT_LEAST_TWO, "tokens a row", required=True)
    _number(step, "--batch", POSITIVE_INT, "rows on each GPU", 1)
    kinds, text = ("none", "reentrant", "non-reentrant"), "gradient checkpointing; alone: as `loretta finetune` does it"
    step.add_argument("--checkpointing", nargs="?", choices=kinds, default=kinds[0], const=kinds[2], help=text)
    device = parser.add_argument_group("devices")
    _number(device, "--gpus", POSITIVE_INT, "how many", 1)
    device.add_argument("--fsdp", action="store_true", help="shard over the GPUs (FSDP2); otherwise each has a copy")
    text = "what a GPU has: adds the verdict and the largest batch"
    _number(device, "--memory", POSITIVE, text, metavar="GIB")
    methods = (*METHODS, "lora", "full")
    _add_methods(parser, nargs="+", choices=methods, default=methods, help="default: all, side by side")
    _add_running(parser)


def _export(parser: Parser) -> None:
    _add_conversion(parser, "folder of the LoRA checkpoint")
    readers = ("peft", "vllm", "sglang", "llama.cpp")
    parser.add_argument("--for", dest="target", choices=readers, default="peft", help="who reads it (default: peft)")


def _merge(parser: Parser) -> None:
    _add_conversion(parser, "folder of the merged model")


def _convert(parser: Parser) -> None:
    parser.add_argument("adapter", metavar="FOLDER", help="folder of the released package's adapter")
    parser.add_argument("--from", dest="source", required=True, choices=("upstream",), help="what wrote the folder")
    parser.add_argument("--out", required=True, metavar="NEW", help="folder of the new adapter")
    text = "the base model; its configuration is read (default: what the adapter says)"
    parser.add_argument("--model", metavar="PATH_OR_ID", help=text)
    text = "what was trained but not saved (norms, DeBERTa's pooler): list it and stop, or take the base model's own"
    parser.add_argument("--missing", choices=("refuse", "base"), default="refuse", help=text)
    _add_running(parser)


def _compress(parser: Parser) -> None:
    parser.add_argument("adapter", metavar="FOLDER", help="folder of the LoRA adapter")
    _number(parser, "--rank", POSITIVE_INT, "no bond has a larger rank", required=True)
    parser.add_argument("--out", required=True, metavar="NEW", help="folder of the rep adapter")
    _add_running(parser)


def _check(parser: Parser) -> None:
    parser.add_argument("--cpu", action="store_true", help="check the CPU, also where there is a GPU")
    parser.add_argument("--all", action="store_true", help="print every output and gradient, not the worst of each")
    _add_running(parser)


_ONE_METHOD = {"required": True, "choices": METHODS, "help": "adp: adapters; rep: reparameterised (LoRA-like)"}


def _add_methods(parser: Parser, **options: Any) -> None:
    """--method with argparse's options, and every hyper-parameter."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", **options)
    for option in METHOD_OPTIONS:
        group.add_argument(option.flag, dest=option.dest, help=option.text, **option.reading)


def _add_model(parser: Parser, required: bool) -> None:
    """--model, --gguf, --dtype, --load-in-4bit, --load-in-8bit, of a model that is loaded."""
    group = parser.add_argument_group("model")
    text = f"folder, .gguf file, or hub id{'' if required else ' (default: the one the adapter was trained on)'}"
    group.add_argument("--model", required=required, metavar="PATH_OR_ID", help=text)
    group.add_argument("--gguf", metavar="FILE", help="name of a GGUF file in the model's folder or repository")
    _add_dtype(group, "bfloat16 on a GPU, else float32")
    quantised = group.add_mutually_exclusive_group()
    for quant, what in QUANTS.items():
        text = f"quantise the base model's weights to {what} with bitsandbytes"
        quantised.add_argument(f"--load-in-{quant}", dest="quant", action="store_const", const=quant, help=text)


def _add_configuration(parser: Parser) -> Any:
    """--model, --gguf, --task, --classes, of a model that is counted and not loaded."""
    group = parser.add_argument_group("model")
    text = "preset, folder, config.json, .gguf file, or hub id of the model"
    group.add_argument("--model", required=True, metavar="MODEL", help=text)
    group.add_argument("--gguf", metavar="FILE", help="name of a GGUF file in the model's folder or repository")
    text = "which head (default: seq_cls for BERT-like presets, else causal_lm)"
    group.add_argument("--task", choices=TASKS, help=text)
    _number(group, "--classes", AT_LEAST_TWO, "classes of seq_cls", 2)
    return group


def _add_dtype(group: Any, shown: str, default: str | None = None) -> None:
    names, text = tuple(DTYPES.values()), f"of the base model: {', '.join(DTYPES)} or the long names (default: {shown})"
    group.add_argument("--dtype", type=_long_name, choices=names, default=default, metavar="DTYPE", help=text)


def _long_name(dtype: str) -> str:
    return DTYPES.get(dtype, dtype)


def _add_data(parser: Parser, task: str | None) -> Any:
    """--data, --columns, --task."""
    group = parser.add_argument_group("data")
    text = "files or hub data sets, all of one kind; see below"
    group.add_argument("--data", required=True, nargs="+", metavar="FILE_OR_ID", help=text)
    text = "names of columns in the data, such as text=sentence label=stars"
    group.add_argument("--columns", type=_column, nargs="+", default=[], metavar="NAME=COLUMN", help=text)
    text = f"default: {task or 'what the adapter or merged model was trained for'}"
    group.add_argument("--task", choices=TASKS, default=task, help=text)
    return group


def _add_conversion(parser: Parser, output: str) -> None:
    """--adapter, --output and the base's options, for commands that turn an adapter into something else."""
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help=output)
    _add_model(parser, required=False)
    _add_running(parser, threads=True)


def _add_running(parser: Parser, threads: bool = False) -> None:
    """--json, and --threads for commands that load a model."""
    group = parser.add_argument_group("running")
    if threads:
        _number(group, "--threads", THREADS, "CPU threads (default: torch's choice)")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
