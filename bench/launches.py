"""The launches that serve a shape class, forward and backward: recorded on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from loretta_kernels.selfcheck import Case

LORA_DROPOUT = 0.05  # PEFT's default

Directions = dict[str, list[Any]]


def would_launch(
    case: Case, N: int, dtype: torch.dtype, arch: str, adapters: int = 0, dropout: bool = True
) -> Directions:
    """What training with the method's defaults launches for N rows on this architecture; nothing runs.

    Args:
        adapters: so many are stacked, and the rows use them in turn.
        dropout: whether tt_lora has any.
    """
    from loretta_kernels._triton.planned import planned

    dropout_p = LORA_DROPOUT if dropout and case.operator == "tt_lora" else 0.0
    options: dict[str, Any] = {"activation": case.activation, "dropout_p": dropout_p, "adapters": adapters}
    return _by_direction(planned(case.operator, case.shapes, dtype, N, arch=arch, **options))


def _by_direction(launches: Iterable[Any]) -> Directions:
    """Those of the forward kernel apart from those of the backward."""
    directions: Directions = {"forward": [], "backward": []}
    for launch in launches:
        directions["forward" if "forward" in launch.kernel.__name__ else "backward"].append(launch)
    return directions
