"""Puts a method on a model, and says in one line where the two do not fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from loretta import get_peft_model
from loretta.cli.distributed import engine
from loretta.cli.errors import UserError, one_line
from loretta.cli.models import AUTO_MODELS


def skeleton(config: Any, task: str, name: str, **options: Any) -> Any:
    """The model of a transformers configuration on the meta device: every shape, no weight.

    `options` are from_config's, such as dtype and attn_implementation.

    Raises:
        UserError: where there is no such model for the task.
    """
    with torch.device("meta"):
        try:
            return AUTO_MODELS[task].from_config(config, **options)
        except ValueError as error:
            raise UserError(f"{name}: no {task} model of this kind: {one_line(error)[:200]}") from error


def wrapped(model: Any, config: Any, **options: Any) -> Any:
    """The model with its adapter; `options` are get_peft_model's.

    Raises:
        UserError: where the model has no such targets, or they cannot be adapted.
    """
    try:
        # DeepSpeed takes one dtype for all that is trained, the base's, and keeps a float32 copy itself
        return get_peft_model(model, config, **{"autocast_adapter_dtype": engine() != "deepspeed"} | options)
    except (TypeError, ValueError) as error:
        raise UserError(f"the method does not fit this model: {one_line(error)}") from error


@contextmanager
def base_only(model: Any) -> Iterator[None]:
    """Run the model as its base for a while.

    PEFT's own switch also changes what requires gradients, which an engine may have taken note of.
    """
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
