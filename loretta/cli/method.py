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
    """An option, the field that it sets in each method's configuration, and how argparse reads it."""

    flag: str
    fields: dict[str, str]
    reading: dict[str, Any]

    @property
    def dest(self) -> str:
        return "method_" + self.flag.strip("-").replace("-", "_")

    def help(self) -> str:
        """The field's own help, and the default of each method that has it."""
        described = {method: _field(method, name) for method, name in self.fields.items()}
        text = next(iter(described.values())).metadata["help"].rstrip(".").replace("%", "%%")
        defaults = {method: _shown(field) for method, field in described.items()}
        if len(self.fields) == 1:
            return f"{text} ({next(iter(self.fields))} only; default {next(iter(defaults.values()))})"
        if len(set(defaults.values())) == 1:
            return f"{text} (default {defaults['adp']})"
        return f"{text} (default: {', '.join(f'{method} {value}' for method, value in defaults.items())})"


def _both(name: str) -> dict[str, str]:
    return {"adp": name, "rep": name}


def _scaling(text: str) -> float | str:
    """A number where it is one; the configuration judges the rest."""
    try:
        return float(text)
    except ValueError:
        return text


OPTIONS = (
    MethodOption("--rank", _both("tensor_rank"), {"type": int, "metavar": "N"}),
    MethodOption("--bottleneck", {"adp": "bottleneck_size"}, {"type": int, "metavar": "N"}),
    MethodOption("--activation", {"adp": "non_linearity"}, {"metavar": "NAME"}),
    MethodOption("--scaling", {"adp": "scaling"}, {"type": _scaling, "metavar": "X"}),
    MethodOption("--parallel", {"adp": "use_parallel_adapter"}, {"action": "store_const", "const": True}),
    MethodOption("--adapterp", {"adp": "use_adapterp"}, {"action": "store_const", "const": True}),
    MethodOption("--dense", {"adp": "tensorized"}, {"action": "store_const", "const": False}),
    MethodOption("--r", {"rep": "r"}, {"type": int, "metavar": "N"}),
    MethodOption("--alpha", {"rep": "lora_alpha"}, {"type": float, "metavar": "X"}),
    MethodOption("--dropout", {"adp": "adapter_dropout", "rep": "lora_dropout"}, {"type": float, "metavar": "P"}),
    MethodOption("--target-modules", _both("target_modules"), {"nargs": "+", "metavar": "NAME"}),
    MethodOption("--layers", _both("layers_to_transform"), {"nargs": "+", "type": int, "metavar": "N"}),
    MethodOption("--modules-to-save", _both("modules_to_save"), {"nargs": "+", "metavar": "NAME"}),
    MethodOption("--bias", _both("bias"), {"metavar": "WHICH"}),
    MethodOption("--init", _both("init_weights"), {"choices": tuple(STARTS)}),
    MethodOption("--no-train-layernorm", _both("train_layernorm"), {"action": "store_const", "const": False}),
    MethodOption("--no-tensorize-head", _both("tensorize_head"), {"action": "store_const", "const": False}),
)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """--method and every hyper-parameter."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", required=True, choices=METHODS, help="adp: adapters; rep: reparameterised (LoRA-like)"
    )
    for option in OPTIONS:
        group.add_argument(option.flag, dest=option.dest, help=option.help(), **option.reading)


def method_config(args: argparse.Namespace, task: str) -> Any:
    """The configuration that the options describe.

    Raises:
        UserError: for an option of the other method, or a value that the configuration refuses.
    """
    given = {option: getattr(args, option.dest) for option in OPTIONS if getattr(args, option.dest) is not None}
    fields = {}
    for option, value in given.items():
        if args.method not in option.fields:
            raise UserError(f"{option.flag} belongs to --method {next(iter(option.fields))}, not {args.method}")
        name = option.fields[args.method]
        if name == "target_modules" and value == ["all-linear"]:
            value = "all-linear"
        fields[name] = STARTS[value] if name == "init_weights" else value
    try:
        return CONFIGS[args.method](task_type=TASK_TYPES[task], **fields)
    except (ValueError, TypeError) as error:
        names = {
            option.fields[args.method]: option.flag for option in given if option.fields[args.method] in str(error)
        }
        flags = f" ({', '.join(names.values())})" if names else ""
        raise UserError(f"{one_line(error)}{flags}") from error


def method_settings(config: Any, method: str) -> dict[str, Any]:
    """The value of every option of the method, in a form that JSON keeps."""
    values = {
        option.flag.lstrip("-"): getattr(config, option.fields[method]) for option in OPTIONS if method in option.fields
    }
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _field(method: str, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(CONFIGS[method]) if field.name == name)


def _shown(field: dataclasses.Field) -> str:
    """A default as the user would give it."""
    if field.name == "init_weights":
        return next(name for name, value in STARTS.items() if value is field.default)
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return "the method's" if field.name == "target_modules" else str(field.default).lower()
