"""The launches that serve a shape class, forward and backward: recorded on tensors without memory, or run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from loretta_kernels import backend
from loretta_kernels.selfcheck import Case

ROWS = ("x_ptr", "residual_ptr", "y_ptr", "dy_ptr", "dx_ptr", "waist_ptr")  # as the kernels name tensors of N rows
LORA_DROPOUT = 0.05  # PEFT's default

Directions = dict[str, list[Any]]


def would_launch(case: Case, N: int, dtype: torch.dtype, arch: str) -> Directions:
    """What training with the method's defaults launches for N rows on this architecture; nothing runs."""
    from loretta_kernels._triton.planned import planned

    dropout_p = LORA_DROPOUT if case.operator == "tt_lora" else 0.0
    return _by_direction(
        planned(case.operator, case.shapes, dtype, N, arch=arch, activation=case.activation, dropout_p=dropout_p)
    )


def launched(case: Case, N: int, dtype: torch.dtype) -> Directions:
    """What is launched for N rows without dropout and with a fixed scale, after it has run in the interpreter."""
    from loretta_kernels._triton.launch import recorded

    problem = case.problem(N, dtype, scale=0.5)
    for name, value in problem.tensors.items():
        value.requires_grad_(name != "residual")
    with backend("triton"), recorded(run=True) as launches:
        problem.run().backward(problem.dy)
    return _by_direction(launches)


def _by_direction(launches: Iterable[Any]) -> Directions:
    """Those of the forward kernel apart from those of the backward."""
    directions: Directions = {"forward": [], "backward": []}
    for launch in launches:
        directions["forward" if "forward" in launch.kernel.__name__ else "backward"].append(launch)
    return directions
