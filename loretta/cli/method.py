"""The method's hyper-parameters: from options to a LoRETTA configuration."""

import argparse
from collections.abc import Collection
from typing import Any

from loretta import LorettaAdpConfig, LorettaRepConfig, TaskType
from loretta.cli.errors import UserError, one_line
from loretta.cli.parser import METHOD_OPTIONS

CONFIGS: dict[str, type] = {"adp": LorettaAdpConfig, "rep": LorettaRepConfig}
TASK_TYPES = {"causal_lm": TaskType.CAUSAL_LM, "seq_cls": TaskType.SEQ_CLS}
STARTS = {"identity": True, "gaussian": "gaussian"}


def check_method_options(args: argparse.Namespace, methods: Collection[str]) -> None:
    """Refuse an option that none of the methods has.

    Raises:
        UserError: naming the option and its method.
    """
    for option in METHOD_OPTIONS:
        if getattr(args, option.dest) is not None and not any(option.field(method) for method in methods):
            owner = "adp" if option.adp else "rep"
            raise UserError(f"{option.flag} belongs to --method {owner}, not {' '.join(methods)}")


def method_config(args: argparse.Namespace, method: str, task: str) -> Any:
    """The configuration that the options of the method describe.

    Raises:
        UserError: for a value that the configuration refuses.
    """
    given = {}
    for option in METHOD_OPTIONS:
        value, field = getattr(args, option.dest), option.field(method)
        if value is None or field is None:
            continue
        if field == "target_modules" and value == ["all-linear"]:
            value = "all-linear"
        given[field] = STARTS[value] if field == "init_weights" else value
    try:
        return CONFIGS[method](task_type=TASK_TYPES[task], **given)
    except (ValueError, TypeError) as error:
        fields = {option.field(method): option.flag for option in METHOD_OPTIONS}
        flags = [f" ({fields[field]})" for field in given if field in str(error)]
        raise UserError("".join([one_line(error), *flags[:1]])) from error
