"""What autocast means for the operators: x is cast as `nn.Linear` casts it, and nothing inside is cast again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on (fp64 is left alone, as torch leaves it)."""
    if is_on(x.device) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def off(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast; it costs nothing where autocast is not on."""
    return torch.autocast(device.type, enabled=False) if is_on(device) else nullcontext()


def is_on(device: torch.device) -> bool:
    """Whether autocast is on for this device; torch refuses the question for the meta device."""
    if not torch._C._is_any_autocast_enabled():  # the question for a device takes ten times as long
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
