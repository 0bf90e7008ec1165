"""The operators as definitions: W materialised, plain autograd, any dtype. For reading, and the oracle of the tests.

Everything is computed in x's dtype; give fp64 tensors for the truth. `mask` stands where the operators have `dropout_p`
and `seed`: it is what dropout multiplies x by, 0 for a dropped element and 1 / (1 - p) for a kept one.

Source: LoRETTA (NAACL 2024, arXiv 2402.11417).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from loretta_kernels.shape import TTShape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda h: h,
}


def tt_matrix(cores: Tensor, shape: TTShape) -> Tensor:
    """W [I, O], W[(i1..ip), (o1..oq)] = G1[i1] ··· Gp[ip] · G(p+1)[o1] ··· G(p+q)[oq]."""
    W = cores.new_ones(1, 1)
    for core, (r, n, r_next) in zip(cores.split(shape.core_sizes), shape.core_shapes, strict=True):
        W = (W @ core.reshape(r, n * r_next)).reshape(-1, r_next)
    return W.reshape(shape.in_features, shape.out_features)


def tt_linear(x: Tensor, cores: Tensor, shape: TTShape, bias: Tensor | None = None) -> Tensor:
    """y = x · W + b."""
    y = x @ tt_matrix(cores.to(x.dtype), shape)
    return y if bias is None else y + bias.to(x.dtype)


def tt_adapter(
    x: Tensor,
    down: Tensor,
    down_shape: TTShape,
    down_bias: Tensor | None,
    up: Tensor,
    up_shape: TTShape,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up)."""
    dropped = x if mask is None else x * mask.to(x.dtype)
    h = tt_linear(dropped, down, down_shape, down_bias)
    delta = tt_linear(ACTIVATIONS[activation](h), up, up_shape, up_bias)
    delta = delta * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
    return delta if residual is None else residual + delta


def tt_lora(
    x: Tensor,
    a: Tensor,
    a_shape: TTShape,
    b: Tensor,
    b_shape: TTShape,
    *,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """y = residual + scale · drop(x) · A · B."""
    return tt_adapter(
        x, a, a_shape, None, b, b_shape, None, activation="identity", scale=scale, residual=residual, mask=mask
    )
