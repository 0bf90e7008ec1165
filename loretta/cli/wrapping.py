"""Puts a method on a model, and says in one line where the two do not fit."""

from typing import Any

import torch

from loretta import get_peft_model
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
        return get_peft_model(model, config, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"the method does not fit this model: {one_line(error)}") from error
