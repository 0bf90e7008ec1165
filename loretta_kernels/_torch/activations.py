"""The activations and their gradients, one fused call each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

# name: (a of h, dh of (da, h, a))
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda da, h, a: _aten.threshold_backward(da, a, 0)),
    "gelu": (F.gelu, lambda da, h, a: _aten.gelu_backward(da, h)),
    "gelu_tanh": (
        lambda h: F.gelu(h, approximate="tanh"),
        lambda da, h, a: _aten.gelu_backward(da, h, approximate="tanh"),
    ),
    "silu": (F.silu, lambda da, h, a: _aten.silu_backward(da, h)),
    "tanh": (torch.tanh, lambda da, h, a: _aten.tanh_backward(da, a)),
    "identity": (lambda h: h, lambda da, h, a: da),
}
