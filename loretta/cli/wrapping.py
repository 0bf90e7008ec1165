"""Puts a method on a model, and says in one line where the two do not fit."""

from typing import Any

from loretta import get_peft_model
from loretta.cli.errors import UserError, one_line


def wrapped(model: Any, config: Any) -> Any:
    """The model with its adapter.

    Raises:
        UserError: where the model has no such targets, or they cannot be adapted.
    """
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"the method does not fit this model: {one_line(error)}") from error
