"""The operators as definitions: plain autograd, any dtype. Written to be read, and the oracle of the tests.

Everything is computed in x's dtype; give fp64 tensors for the truth. `mask` stands where the operators have `dropout_p`
and `seed`: it is what dropout multiplies x by, 0 for a dropped element and 1 / (1 - p) for the others. With `index` the
parameters have one dimension more, the first: each row of x uses the adapter that index names, and none for -1.

Example:
    >>> shape = TTShape.for_matrix(768, 64, rank=5)
    >>> cores = torch.randn(shape.num_params, dtype=torch.float64)
    >>> y = tt_linear(torch.randn(4, 768, dtype=torch.float64), TT(cores, shape))

Source: LoRETTA (NAACL 2024, arXiv 2402.11417).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from loretta_kernels.shape import TTShape
from loretta_kernels.train import TT

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda h: h,
}


def tt_sides(cores: Tensor, shape: TTShape) -> tuple[Tensor, Tensor]:
    """L [I, K] and R [K, O], whose product is W: the products of the input cores and of the output cores."""
    matrices = [
        core.reshape(r, n * r_next)
        for core, (r, n, r_next) in zip(cores.split(shape.core_sizes), shape.core_shapes, strict=True)
    ]
    L, R = matrices[0], matrices[shape.cut]
    for matrix in matrices[1 : shape.cut]:
        L = L.reshape(-1, len(matrix)) @ matrix
    for matrix in matrices[shape.cut + 1 :]:
        R = R.reshape(-1, len(matrix)) @ matrix
    in_factor, out_factor = shape.factors
    return in_factor * L.reshape(-1, shape.waist), out_factor * R.reshape(shape.waist, -1)


def tt_matrix(train: TT) -> Tensor:
    """W [I, O], W[(i1..ip), (o1..oq)] = G1[i1] ··· Gp[ip] · G(p+1)[o1] ··· G(p+q)[oq] · 2 ** (gains)."""
    L, R = tt_sides(train.cores, train.shape)
    return L @ R


def tt_linear(x: Tensor, train: TT, *, index: Tensor | None = None) -> Tensor:
    """y = x · W + b, as (x · L) · R + b; 0 where index is -1."""
    if index is not None:
        return _each(x, index, len(train.cores), train.shape, lambda rows, a: tt_linear(rows, _one(train, a)))
    L, R = tt_sides(train.cores.to(x.dtype), train.shape)
    y = x @ L @ R
    return y if train.bias is None else y + train.bias.to(x.dtype)


def tt_adapter(
    x: Tensor,
    down: TT,
    up: TT,
    *,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up); residual where index is -1."""
    dropped = x if mask is None else x * mask.to(x.dtype)
    if index is not None:

        def one(rows: Tensor, a: int) -> Tensor:
            own = scale if not isinstance(scale, Tensor) or scale.numel() == 1 else scale[a]
            return tt_adapter(rows, _one(down, a), _one(up, a), activation=activation, scale=own)

        delta = _each(dropped, index, len(down.cores), up.shape, one)
    else:
        delta = tt_linear(ACTIVATIONS[activation](tt_linear(dropped, down)), up)
        delta = delta * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
    return delta if residual is None else residual + delta


def tt_lora(
    x: Tensor,
    a: TT,
    b: TT,
    *,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """y = residual + scale · drop(x) · A · B; residual where index is -1."""
    return tt_adapter(x, a, b, activation="identity", scale=scale, residual=residual, mask=mask, index=index)


def _one(stack: TT, a: int) -> TT:
    """One train of a stack."""
    return TT(stack.cores[a], stack.shape, None if stack.bias is None else stack.bias[a])


def _each(x: Tensor, index: Tensor, adapters: int, shape: TTShape, one: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What `one(rows, adapter)` makes of the rows of each adapter, and 0 for those of none."""
    index = index.reshape(*index.shape, *[1] * (x.dim() - index.dim()))
    y = x.new_zeros(*x.shape[:-1], shape.out_features)
    for a in range(adapters):
        mine = index == a  # other adapters' rows never reach this one: 0 · infinity is not 0
        y = torch.where(mine, one(torch.where(mine, x, 0), a), y)
    return y
