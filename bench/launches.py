"""The launches that serve a shape class, forward and backward: recorded on tensors without memory, or run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loretta_kernels.selfcheck import Case
from loretta_kernels.selfcheck.cases import random_arguments

ROWS = ("x_ptr", "residual_ptr", "y_ptr", "dy_ptr", "dx_ptr", "waist_ptr")  # as the kernels name tensors of N rows
LORA_DROPOUT = 0.05  # PEFT's default
META = torch.device("meta")

Directions = dict[str, list[Any]]


def would_launch(case: Case, N: int, dtype: torch.dtype, arch: str) -> Directions:
    """What training with the method's defaults launches for N rows on this architecture; nothing runs."""
    arguments, dy = random_arguments(case, 1, dtype, META)
    resized = {name: _rows(value, N) for name, value in arguments.items()}
    with _planned_for(arch):
        return _launches(case, resized, _rows(dy, N), LORA_DROPOUT if case.operator == "tt_lora" else 0.0, run=False)


def launched(case: Case, N: int, dtype: torch.dtype) -> Directions:
    """What is launched for N rows without dropout, after it has run, in the interpreter."""
    arguments, dy = random_arguments(case, N, dtype, torch.device("cpu"))
    return _launches(case, arguments, dy, 0.0, run=True)


def _rows(value: Any, N: int) -> Any:
    """A tensor of rows with N of them; anything else as it is."""
    return value.new_empty(N, value.shape[1]) if isinstance(value, Tensor) and value.dim() == 2 else value


@contextmanager
def _planned_for(arch: str) -> Iterator[None]:
    """Let tensors that are on no GPU be planned for as if they were on this one."""
    from loretta_kernels._triton import operands

    previous, operands.DEFAULT_ARCHITECTURE = operands.DEFAULT_ARCHITECTURE, arch
    try:
        yield
    finally:
        operands.DEFAULT_ARCHITECTURE = previous


def _launches(case: Case, arguments: dict[str, Any], dy: Tensor, dropout_p: float, run: bool) -> Directions:
    """Call the two functions of the operator, with every gradient but that of a fixed scale."""
    from loretta_kernels import _triton
    from loretta_kernels._triton.launch import recorded

    x, specs = arguments["x"], [list(shape.spec) for shape in case.shapes]
    if case.operator == "tt_linear":
        forward, backward = _triton.tt_linear_fwd, _triton.tt_linear_bwd
        trains = {"cores": arguments["cores"], "spec": specs[0], "bias": arguments["bias"]}
        needs, fixed = [True] * 3, {}
        given = {}
    else:
        forward, backward = _triton.tt_adapter_fwd, _triton.tt_adapter_bwd
        down, up = ("a", "b") if case.operator == "tt_lora" else ("down", "up")
        biases = [arguments.get(f"{name}_bias") for name in (down, up)]
        trains = {
            "down": arguments[down],
            "down_spec": specs[0],
            "down_bias": biases[0],
            "up": arguments[up],
            "up_spec": specs[1],
            "up_bias": biases[1],
            "learnt_scale": None,
            "seed": torch.tensor(0, device=x.device) if dropout_p else None,
        }
        residual = arguments["residual"]
        fixed = {
            "residual_is_x": residual == "x" if isinstance(residual, str) else False,
            "scale": 0.5,
            "activation": case.activation,
            "dropout_p": dropout_p,
        }
        given = {"residual": residual if isinstance(residual, Tensor) else None}
        needs = [True, True, biases[0] is not None, True, biases[1] is not None, False]
    with recorded(run=run) as of_forward:
        _, waist = forward(x=x, **trains, **given, **fixed)
    with recorded(run=run) as of_backward:
        backward(dy=dy, x=x, waist=waist, **trains, **fixed, needs=needs)
    return {"forward": of_forward, "backward": of_backward}
