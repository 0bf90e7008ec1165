"""The operator for at most `MOST_ROWS` rows without gradients, as in decoding, where calls and Python dominate time.

What depends on the parameters is cached with them, and used while their values are equal to the cached ones. A call
then costs what a LoRA's or a bottleneck adapter's does: one product for each factor. Arguments that were checked in an
earlier call are not checked once more (`infer_cached`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from loretta_kernels._torch import grouped
from loretta_kernels._torch.activations import ACTIVATIONS
from loretta_kernels._torch.adapter import has_hidden, parameters_of
from loretta_kernels.call import Call
from loretta_kernels.train import TT

MOST_ROWS = 64
_cache: dict[tuple[int, int], _Prepared] = {}


class _Prepared:
    """A call's parameters, ready for rows."""

    def __init__(self, call: Call, forget: Callable[[Any], None]) -> None:
        self._alive = ref(call.down, forget)
        self.dtype, self.constants = call.x.dtype, call[9:]
        self.in_features, self.out_features = call.x.shape[-1], call.out_features
        self.copies = [None if parameter is None else parameter.detach().clone() for parameter in call[1:6]]
        self.delta = _delta(call)

    def serves(self, x: Tensor, parameters: tuple[Any, ...], constants: tuple[Any, ...]) -> bool:
        """Whether a call has parameters of equal values and the same constants."""
        if self.dtype is not x.dtype or self.constants != constants:
            return False
        for parameter, copy in zip(parameters, self.copies, strict=True):
            if parameter is None or copy is None:
                if parameter is not copy:
                    return False
            elif not parameter.is_cpu or parameter.dtype is not copy.dtype or not torch.equal(parameter, copy):
                return False
        return True


def infer_cached(
    x: Any, down: Any, up: Any, activation: str, scale: Any, residual: Any, is_plain: Callable[..., bool]
) -> Tensor | None:
    """y where a call with equal parameters was served before; None where the arguments must be checked first."""
    if type(down) is not TT or type(up) is not TT or type(scale) is not float:
        return None
    known = _cache.get((id(down.cores), id(up.cores)))
    if known is None or type(x) is not Tensor:
        return None
    residual_is_x, size = residual is x, x.shape
    if not size or size[-1] != known.in_features or x.numel() > MOST_ROWS * known.in_features:
        return None
    if residual is None or residual_is_x:
        if not is_plain((x,)):
            return None
    elif (
        type(residual) is not Tensor
        or not is_plain((x, residual))
        or residual.dtype is not x.dtype
        or residual.shape != (*size[:-1], known.out_features)
    ):
        return None
    parameters = down.cores, down.bias, up.cores, up.bias, None
    if not known.serves(x, parameters, (down.shape, up.shape, residual_is_x, scale, activation, 0.0)):
        return None
    y = known.delta(x)
    return y if residual is None else y.add_(residual)


def infer(call: Call) -> Tensor | None:
    """y of stacked adapters, or of at most `MOST_ROWS` rows on a CPU in fp32 or fp64; None: `forward` must serve."""
    if call.adapter is not None:
        return grouped.infer(call)
    x = call.x
    if (
        x.device.type != "cpu"
        or x.numel() > MOST_ROWS * x.shape[-1]
        or call.seed is not None
        or call.adapter is not None
    ):
        return None
    residual = x if call.residual_is_x else call.residual
    if x.dtype is not call.sum_dtype or (residual is not None and residual.dtype is not x.dtype):
        return None
    key = id(call.down), id(call.up)
    known = _cache.get(key)
    if known is None or not known.serves(x, call[1:6], call[9:]):
        known = _cache[key] = _Prepared(call, partial(_forget, key))
    y = known.delta(x)
    return y if residual is None else y.add_(residual)


def _forget(key: tuple[int, int], _: Any) -> None:
    _cache.pop(key, None)


def _delta(call: Call) -> Callable[[Tensor], Tensor]:
    """The function from x to what is added to the residual."""
    parameters = parameters_of(call)
    Lt, M, R, ones = parameters.down.Lt, parameters.M, parameters.R, parameters.ones
    if has_hidden(call):
        act, Rt, bias = ACTIVATIONS[call.activation][0], parameters.down.R.t(), call.down_bias
        bias, Mt = None if bias is None else bias.to(Rt.dtype), M.t()
        return lambda x: F.linear(act(F.linear(F.linear(x, Lt), Rt, bias)), Mt, ones) @ R
    if ones is None:
        folded = M @ R
        return lambda x: F.linear(x, Lt) @ folded
    folded, bias = (M[:, :-1] @ R[:-1]).t(), R[-1].clone()
    return lambda x: F.linear(F.linear(x, Lt), folded, bias)
