"""Checks of the configs' fields: a wrong value is a ValueError that names it and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loretta_kernels import TTShape


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """An int, no bool, of at least `low` and at most `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value!r}")


def require_number(name: str, value: Any, also: str | None = None) -> None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number{f' or {also}' if also else ''}, got {value!r}")


def require_dropout(name: str, value: Any) -> None:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def require_bool(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def require_choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    """One of the accepted values."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def as_set(name: str, value: Any) -> Any:
    """Names as a set; a string (one name or a regex) and None stay."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a string or a list of module names, got {value!r}")
    return set(value)


def as_pattern(name: str, value: Any) -> dict[str, Any]:
    """A dict from module names; none is an empty one."""
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} must be a dict from module names to numbers, got {value!r}")
    return value or {}


def normalised_modes(tensor_shape: Any) -> dict[str, list[int]] | None:
    """tensor_shape with sizes as text, as JSON has them."""
    if tensor_shape is None:
        return None
    if not isinstance(tensor_shape, dict):
        raise ValueError(f"tensor_shape must be a dict from a size to its modes, got {tensor_shape!r}")
    normalised = {}
    for size, modes in tensor_shape.items():
        valid = isinstance(modes, (list, tuple)) and all(
            isinstance(mode, int) and not isinstance(mode, bool) and mode >= 1 for mode in modes
        )
        if not valid or not modes or not str(size).isdecimal() or math.prod(modes) != int(size):
            raise ValueError(
                f"tensor_shape: the modes of {size} must be positive integers of that product, got {modes!r}"
            )
        normalised[str(int(size))] = list(modes)
    return normalised


def check_matrix_shapes(matrix_shapes: Any) -> None:
    """Each train is one, and one of the matrix it is named by."""
    if matrix_shapes is None:
        return
    if not isinstance(matrix_shapes, dict):
        raise ValueError(f"matrix_shapes must be a dict from a matrix to its train, got {matrix_shapes!r}")
    for matrix, train in matrix_shapes.items():
        try:
            if "gains" in train:
                raise TypeError("gains follow from core_gain")
            shape = TTShape(**train)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"matrix_shapes: the train of {matrix} must be in_modes, out_modes and ranks, got {train!r} ({error})"
            ) from None
        if matrix != f"{shape.in_features}x{shape.out_features}":
            raise ValueError(
                f"matrix_shapes: the train of {matrix} is one of {shape.in_features}x{shape.out_features}: {train!r}"
            )
