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
PRESETS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
FIELDS = ("text", "text_pair", "label", "prompt", "completion", "messages")
DATA_FORMATS = """\
data formats, told by the suffix (capitals too, each also with .gz); all rows are of one kind:
  .txt             plain UTF-8 text, a file a document, cut into blocks of --seq-len tokens
  .jsonl           one JSON object a line (a blank line is allowed at the end only):
    {"text": "Once upon a time ..."}
    {"prompt": "Translate: chat", "completion": " cat"}      loss on the completion only
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
                                                             loss on the assistant's turns only
    {"instruction": "Add.", "input": "2, 3", "output": "5"}  Alpaca: its template as prompt, loss on the output
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}   ShareGPT: as messages
    {"text": "A fine film", "label": "good"}                 --task seq_cls: a name, a number or true or false
    {"text": "It rains.", "text_pair": "It is wet.", "label": "entailment"}        two texts
  .json            an array of such objects, or one object a line
  .csv, .tsv       a header line with those names, then one record a line; a .csv may be cut by , ; or tabs
  .parquet         columns with those names
  ID[:CONFIG[:SPLIT]]   a hub data set (split train): nyu-mll/glue:mrpc:validation
.parquet and the hub need: pip install 'loretta-tt[data]'. Columns of other names: --columns text=sentence
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help keeps its lines as written."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

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
        if value is None or not self.accepts(value):
            raise argparse.ArgumentTypeError(f"must be {self.wanted}, not {text!r}")
        return value


NATURAL = Number(int, lambda value: value >= 0, "a whole number of at least 0")
SEED = Number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
POSITIVE_INT = Number(int, lambda value: value >= 1, "a whole number of at least 1")
AT_LEAST_TWO = Number(int, lambda value: value >= 2, "a whole number of at least 2")
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
    name, equals, column = text.partition("=")
    if name not in FIELDS or not equals or not column:
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
_TARGETS = "ends of the names of the linears to adapt, or: all-linear (default: by the model's family)"
_BIASES = (
    "which biases of the base are trained: none, all, or those of the adapted linears "
    "(adapter_only for adp, lora_only for rep) (default none)"
)
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
        ("--no-train-layernorm", "train_layernorm", "train_layernorm", "leave the base's norms as they are", _OFF),
        ("--no-tensorize-head", "tensorize_head", "tensorize_head", "seq_cls: keep the head's dense layer dense", _OFF),
    )
)


def make_parser() -> Parser:
    """The parser of all commands; `command` in its result names the module of `loretta.cli` that runs it."""
    parser = Parser(
        prog="loretta",
        description="Fine-tune language models with LoRETTA's tensor-train adapters (LoRETTA_adp, LoRETTA_rep).",
        epilog="""\
start with:
  loretta finetune --model HuggingFaceTB/SmolLM2-135M --data book.txt --method adp --steps 200 --output runs/book
  loretta eval --adapter runs/book --data other.txt

Each command has its own help: loretta finetune --help
""",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in (_finetune, _eval, _params, _plan, _export, _merge, _convert, _compress, _check):
        add(commands)
    return parser


def _add_model(parser: Parser, required: bool) -> None:
    """--model, --gguf, --dtype, --load-in-4bit, --load-in-8bit."""
    group = parser.add_argument_group("model")
    text = f"folder, .gguf file, or hub id{'' if required else ' (default: the one the adapter was trained on)'}"
    group.add_argument("--model", required=required, metavar="PATH_OR_ID", help=text)
    group.add_argument("--gguf", metavar="FILE", help="name of a GGUF file in the model's folder or repository")
    _add_dtype(group, "bfloat16 on a GPU, else float32")
    quantised = group.add_mutually_exclusive_group()
    for quant, what in QUANTS.items():
        text = f"quantise the base model's weights to {what} with bitsandbytes"
        quantised.add_argument(f"--load-in-{quant}", dest="quant", action="store_const", const=quant, help=text)


def _add_dtype(group: Any, shown: str, default: str | None = None) -> None:
    names, text = tuple(DTYPES.values()), f"of the base model: {', '.join(DTYPES)} or the long names (default: {shown})"
    read: Callable[[str], str] = lambda name: DTYPES.get(name, name)  # noqa: E731
    group.add_argument("--dtype", type=read, choices=names, default=default, metavar="DTYPE", help=text)


def _add_data(group: Any) -> None:
    text = "files or hub data sets, all of one kind; see below"
    group.add_argument("--data", required=True, nargs="+", metavar="FILE_OR_ID", help=text)
    text = "names of columns in the data, such as text=sentence label=stars"
    group.add_argument("--columns", type=_column, nargs="+", default=[], metavar="NAME=COLUMN", help=text)


def _add_json(parser: Parser, threads: bool = False) -> None:
    """--json, and --threads for commands that load a model."""
    group = parser.add_argument_group("running")
    if threads:
        _number(group, "--threads", POSITIVE_INT, "CPU threads (default: torch's choice)")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_methods(parser: Parser, **options: Any) -> None:
    """--method with argparse's options, and every hyper-parameter."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", **options)
    for option in METHOD_OPTIONS:
        group.add_argument(option.flag, dest=option.dest, help=option.text, **option.reading)


_ONE_METHOD = {"required": True, "choices": METHODS, "help": "adp: adapters; rep: reparameterised (LoRA-like)"}


def _finetune(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train an adapter on a text, JSONL or CSV file",
        description="Fine-tune a causal language model or a classifier with a LoRETTA adapter.",
        usage="loretta finetune --model MODEL --data FILE --method {adp,rep} --output DIR [option ...]",
        epilog=f"""\
{DATA_FORMATS}
examples:
  loretta finetune --model HuggingFaceTB/SmolLM2-135M --data book.txt --method adp --steps 200 --output runs/book
  loretta finetune --model ./llama --data chats.jsonl --method rep --r 16 --rank 8 --epochs 3 --output runs/chat --plot
  loretta finetune --model roberta-base --task seq_cls --data reviews.csv --method adp --output runs/reviews
  loretta finetune --model ./smollm2 --gguf SmolLM2-135M.Q4_1.gguf --data book.txt --method adp --output runs/book

The adapter is swapped in when it is complete; until then the work is in OUTPUT.part, where --resume finds it.
The result goes to stdout, progress to stderr. Exit code 2: something given cannot be used, and one line says what.
""",
    )
    _add_model(parser, required=True)
    data = parser.add_argument_group("data")
    _add_data(data)
    data.add_argument("--task", choices=TASKS, default="causal_lm", help="default: causal_lm")
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
    _number(training, "--lr", POSITIVE, "learning rate: tensor-train products need far more than LoRA", 1e-2)
    _number(training, "--batch-size", POSITIVE_INT, "rows a batch, in each process", 8)
    _number(training, "--grad-accum", POSITIVE_INT, "batches a step", 1)
    _number(training, "--weight-decay", NOT_NEGATIVE, "of the optimiser", 0.0)
    schedules = ("linear", "cosine", "constant")
    training.add_argument("--lr-schedule", choices=schedules, default="linear", help="default: linear")
    _number(training, "--warmup", SHARE, "part of the steps that raise the rate", 0.1)
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    _number(training, "--seed", SEED, "of everything random", 0)
    output = parser.add_argument_group("output")
    text = "folder of the adapter; a former run's is replaced"
    output.add_argument("--output", required=True, metavar="DIR", help=text)
    _number(output, "--save-steps", NATURAL, "steps between checkpoints, 0: none", 100)
    text = "go on from the newest complete checkpoint of the same run"
    output.add_argument("--resume", action="store_true", help=text)
    output.add_argument("--plot", action="store_true", help="draw the loss curve into OUTPUT/loss.png")
    _add_json(parser, threads=True)


def _eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity or accuracy of a model or a saved adapter",
        description="Evaluate a base model, a merged model, a LoRETTA adapter, or an exported LoRA adapter.",
        epilog=f"""\
{DATA_FORMATS}
examples:
  loretta eval --adapter runs/book --data held-out.txt
  loretta eval --model runs/book-merged --data held-out.txt
  loretta eval --model HuggingFaceTB/SmolLM2-135M --data held-out.txt --seq-len 128 --json
""",
    )
    _add_model(parser, required=False)
    parser.add_argument("--adapter", metavar="DIR", help="folder of a LoRETTA or plain LoRA adapter")
    data = parser.add_argument_group("data")
    _add_data(data)
    data.add_argument("--task", choices=TASKS, help="default: what the adapter or merged model was trained for")
    _number(data, "--seq-len", AT_LEAST_TWO, "default: as trained, else 256")
    _number(data, "--batch-size", POSITIVE_INT, "default: as trained, else 8")
    _number(data, "--eval-limit", POSITIVE_INT, "the first N blocks or rows only")
    _add_json(parser, threads=True)


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


def _params(commands: Any) -> None:
    parser = commands.add_parser(
        "params",
        help="count what would be trained, without loading a weight",
        description="Trainable parameters by group: cores, biases, norms, head.",
        usage="loretta params --model MODEL --method {adp,rep} [option ...]",
        epilog=f"""\
presets, known offline: {", ".join(PRESETS)}

examples:
  loretta params --model llama-2-7b --method adp
  loretta params --model llama-2-7b --method rep --r 16 --rank 8
  loretta params --model ./config.json --task seq_cls --method adp --bottleneck 32

Each group is printed with the total up to it: published counts differ in where they stop.
""",
    )
    _add_configuration(parser)
    _add_methods(parser, **_ONE_METHOD)
    _add_json(parser)


def _plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="will it fit: memory a GPU needs, without loading a weight",
        description="Memory of a training step on each GPU: LoRETTA's methods, LoRA and full fine-tuning side by side.",
        usage="loretta plan --model MODEL --seq N [option ...]",
        epilog=f"""\
presets, known offline: {", ".join(PRESETS)}

examples:
  loretta plan --model llama-2-7b --seq 2048 --batch 4 --memory 24
  loretta plan --model llama-2-70b --seq 4096 --quant 4bit-double --checkpointing --memory 80
  loretta plan --model llama-3.1-405b --seq 4096 --gpus 16 --fsdp --checkpointing --method adp rep --memory 80

The step is run on tensors that have sizes and no memory: forward, loss, backward; AdamW; rows without padding, no
autocast, no accumulation. Weights, gradients, optimiser and activations (what autograd saves) are counted. The peak,
which adds what operators need in passing, is an estimate, and knows neither the CUDA context nor the allocator's gaps:
leave a quarter free.
lora: PEFT's LoRA with rep's --r, --alpha, --dropout and targets. full: every weight, trained in --dtype.
""",
    )
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
    _add_json(parser)


def _add_conversion(parser: Parser, output: str) -> None:
    """--adapter, --output and the base's options, for commands that turn an adapter into something else."""
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help=output)
    _add_model(parser, required=False)
    _add_json(parser, threads=True)


def _export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a rep adapter as a plain LoRA checkpoint",
        description="Write a rep adapter as a plain LoRA checkpoint with the same logits, norms and heads included.",
        epilog="""\
example:
  loretta export --adapter runs/book --output runs/book-lora

Stock PEFT, and whatever reads its format, loads the result without loretta.
""",
    )
    _add_conversion(parser, "folder of the LoRA checkpoint")


def _merge(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="fold a rep adapter into its base model",
        description="Write the base model with the adapter in its weights. For rep (and LoRA) adapters: an adp adapter "
        "has a nonlinearity inside and cannot be merged.",
        epilog="""\
example:
  loretta merge --adapter runs/book --output runs/book-merged

The result is a plain transformers folder: weights, config and tokenizer.
""",
    )
    _add_conversion(parser, "folder of the merged model")


def _convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="take over an adapter of the released loretta package",
        description="Write an adapter of the released loretta package as one that PEFT loads once loretta-tt is "
        "imported. The function is the same; a pickle that holds more than tensors is refused.",
        epilog="""\
example:
  loretta convert --from upstream runs/old --out runs/new

runs/old holds adapter_config.json and adapter_model.bin, as the released package (PyPI loretta 0.1.0) writes them.
""",
    )
    parser.add_argument("adapter", metavar="FOLDER", help="folder of the released package's adapter")
    parser.add_argument("--from", dest="source", required=True, choices=("upstream",), help="what wrote the folder")
    parser.add_argument("--out", required=True, metavar="NEW", help="folder of the new adapter")
    text = "the base model; its configuration is read (default: what the adapter says)"
    parser.add_argument("--model", metavar="PATH_OR_ID", help=text)
    text = "what was trained but not saved (norms, DeBERTa's pooler): list it and stop, or take the base model's own"
    parser.add_argument("--missing", choices=("refuse", "base"), default="refuse", help=text)
    _add_json(parser)


def _compress(commands: Any) -> None:
    parser = commands.add_parser(
        "compress",
        help="turn a LoRA adapter into a smaller rep adapter",
        description="Decompose the factors of a LoRA adapter into tensor trains, and print the error of every layer.",
        epilog="""\
example:
  loretta compress --rank 5 runs/lora --out runs/rep

runs/lora is an adapter of PEFT's LoRA. The error printed for a layer is that of its update B·A, relative, in the
Frobenius norm; a larger --rank lowers it.
""",
    )
    parser.add_argument("adapter", metavar="FOLDER", help="folder of the LoRA adapter")
    _number(parser, "--rank", POSITIVE_INT, "no bond has a larger rank", required=True)
    parser.add_argument("--out", required=True, metavar="NEW", help="folder of the rep adapter")
    _add_json(parser)


def _check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check the kernels on this machine",
        description="Check every operator on the GPU, or on the CPU where there is none.",
        usage="loretta check [option ...]",
        epilog="""\
Every output and gradient is compared with its definition in fp64; its error may be twice that of plain PyTorch in the
same dtype. Exit code 1 when one is above. On a GPU, forward and backward are timed against a copy of the same bytes.

examples:
  loretta check
  loretta check --cpu --all
""",
    )
    parser.add_argument("--cpu", action="store_true", help="check the CPU, also where there is a GPU")
    parser.add_argument("--all", action="store_true", help="print every output and gradient, not the worst of each")
    _add_json(parser)
