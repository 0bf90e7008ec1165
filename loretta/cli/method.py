"""The method's hyper-parameters: from options to a LoRETTA configuration, defaults taken from the configurations."""

import argparse
import dataclasses
from typing import Any

from loretta import LorettaAdpConfig, LorettaRepConfig, TaskType
from loretta.cli.errors import UserError, one_line
from loretta.cli.options import METHODS

CONFIGS: dict[str, type] = {"adp": LorettaAdpConfig, "rep": LorettaRepConfig}
TASK_TYPES = {"causal_lm": TaskType.CAUSAL_LM, "seq_cls": TaskType.SEQ_CLS}
STARTS = {"identity": True, "gaussian": "gaussian"}


@dataclasses.dataclass(frozen=True)
class MethodOption:
    """An option, the field that it sets in each method's configuration, its help, and how argparse reads it."""

    flag: str
    fields: dict[str, str]
    text: str
    reading: dict[str, Any]

    @property
    def dest(self) -> str:
        return "method_" + self.flag.strip("-").replace("-", "_")

    def help(self) -> str:
        """The text, which method has the option, and the default where there is one to show."""
        only = f"{next(iter(self.fields))} only" if len(self.fields) == 1 else ""
        shown = {method: _shown_default(method, name) for method, name in self.fields.items()}
        same = len(set(shown.values())) == 1
        default = shown[next(iter(shown))] if same else ", ".join(f"{value} for {m}" for m, value in shown.items())
        notes = [note for note in (only, f"default {default}" if default else "") if note]
        return f"{self.text} ({'; '.join(notes)})" if notes else self.text


def _both(name: str) -> dict[str, str]:
    return {"adp": name, "rep": name}


def _scaling(text: str) -> float | str:
    """A number where it is one; the configuration judges the rest."""
    try:
        return float(text)
    except ValueError:
        return text


_ON = {"action": "store_const", "const": True}
_OFF = {"action": "store_const", "const": False}
_INT = {"type": int, "metavar": "N"}

OPTIONS = (
    MethodOption("--rank", _both("tensor_rank"), "rank of every bond of the tensor trains", _INT),
    MethodOption("--bottleneck", {"adp": "bottleneck_size"}, "width of the bottleneck", _INT),
    MethodOption(
        "--activation", {"adp": "non_linearity"}, "relu, gelu, gelu_tanh, silu, tanh or identity", {"metavar": "NAME"}
    ),
    MethodOption(
        "--scaling", {"adp": "scaling"}, "factor of the adapter, or: learned", {"type": _scaling, "metavar": "X"}
    ),
    MethodOption("--parallel", {"adp": "use_parallel_adapter"}, "adapters beside the linears, not in series", _ON),
    MethodOption("--adapterp", {"adp": "use_adapterp"}, "adapters on the output of the feed-forward blocks only", _ON),
    MethodOption("--dense", {"adp": "tensorized"}, "plain matrices in the place of tensor trains", _OFF),
    MethodOption("--r", {"rep": "r"}, "inner dimension of the two factors", _INT),
    MethodOption(
        "--alpha", {"rep": "lora_alpha"}, "the update is scaled by alpha / r", {"type": float, "metavar": "X"}
    ),
    MethodOption(
        "--dropout",
        {"adp": "adapter_dropout", "rep": "lora_dropout"},
        "dropout on the adapter's input",
        {"type": float, "metavar": "P"},
    ),
    MethodOption(
        "--target-modules",
        _both("target_modules"),
        "ends of the names of the modules to adapt, or: all-linear (default: by the model's family)",
        {"nargs": "+", "metavar": "NAME"},
    ),
    MethodOption(
        "--layers",
        _both("layers_to_transform"),
        "indices of the layers to adapt (default: all)",
        {"nargs": "+", "type": int, "metavar": "N"},
    ),
    MethodOption(
        "--modules-to-save",
        _both("modules_to_save"),
        "further modules to train and save whole",
        {"nargs": "+", "metavar": "NAME"},
    ),
    MethodOption(
        "--bias",
        _both("bias"),
        "which biases of the base are trained: none, all, or those of the adapted linears "
        "(adapter_only for adp, lora_only for rep)",
        {"metavar": "WHICH"},
    ),
    MethodOption(
        "--init",
        _both("init_weights"),
        "identity: start as the base model; gaussian: as in the paper",
        {"choices": tuple(STARTS)},
    ),
    MethodOption("--no-train-layernorm", _both("train_layernorm"), "leave the base's norms as they are", _OFF),
    MethodOption(
        "--no-tensorize-head", _both("tensorize_head"), "seq_cls: keep the dense layer of the head dense", _OFF
    ),
)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """--method and every hyper-parameter."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", required=True, choices=METHODS, help="adp: adapters; rep: reparameterised (LoRA-like)"
    )
    add_hyperparameters(group)


def add_hyperparameters(group: Any) -> None:
    """Every hyper-parameter of both methods."""
    for option in OPTIONS:
        group.add_argument(option.flag, dest=option.dest, help=option.help(), **option.reading)


def method_config(args: argparse.Namespace, task: str) -> Any:
    """The configuration that the options describe.

    Raises:
        UserError: for an option of the other method, or a value that the configuration refuses.
    """
    given = [option for option in OPTIONS if getattr(args, option.dest) is not None]
    fields = {}
    for option in given:
        value = getattr(args, option.dest)
        if args.method not in option.fields:
            raise UserError(f"{option.flag} belongs to --method {next(iter(option.fields))}, not {args.method}")
        name = option.fields[args.method]
        if name == "target_modules" and value == ["all-linear"]:
            value = "all-linear"
        fields[name] = STARTS[value] if name == "init_weights" else value
    try:
        return CONFIGS[args.method](task_type=TASK_TYPES[task], **fields)
    except (ValueError, TypeError) as error:
        flags = [option.flag for option in given if option.fields[args.method] in str(error)]
        raise UserError(f"{one_line(error)}{f' ({flags[0]})' if flags else ''}") from error


def method_settings(config: Any, method: str) -> dict[str, Any]:
    """The value of every option of the method, in a form that JSON keeps."""
    values = {
        option.flag.lstrip("-"): getattr(config, option.fields[method]) for option in OPTIONS if method in option.fields
    }
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _shown_default(method: str, name: str) -> str:
    """The default of a field as the user would give it; empty for switches and where the text says it."""
    default = next(field.default for field in dataclasses.fields(CONFIGS[method]) if field.name == name)
    if name == "init_weights":
        return next(start for start, value in STARTS.items() if value is default)
    return "" if default is None or isinstance(default, bool) else f"{default}"
