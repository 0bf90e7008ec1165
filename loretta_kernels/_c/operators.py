"""What the operators hand to C, and what they make of its answers; the arguments are those of `_torch`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels._c.call import ACTIVATIONS, Call, address, fp32_room, new_call, rows_of, run
from loretta_kernels.shape import TTShape


def tt_adapter_fwd(
    x: Tensor,
    down: Tensor,
    down_spec: Sequence[int],
    down_bias: Tensor | None,
    up: Tensor,
    up_spec: Sequence[int],
    up_bias: Tensor | None,
    learnt_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    residual_is_x: bool,
    scale: float,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """y and the down waist."""
    call = new_call(x, (tuple(down_spec), tuple(up_spec)), down, down_bias, up, up_bias)
    _set_options(call, learnt_scale, seed, residual_is_x, scale, activation, dropout_p)
    waist = TTShape.from_spec(tuple(down_spec)).waist
    if residual is None:
        return _forward(call, x, x.dtype, waist)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    residual, call.ldr = rows_of(residual)
    call.residual, call.residual_bf16 = residual.data_ptr(), _is_bf16(residual)
    return _forward(call, x, dtype, waist)


def tt_adapter_bwd(
    dy: Tensor,
    x: Tensor,
    waist: Tensor,
    down: Tensor,
    down_spec: Sequence[int],
    down_bias: Tensor | None,
    up: Tensor,
    up_spec: Sequence[int],
    up_bias: Tensor | None,
    learnt_scale: Tensor | None,
    seed: Tensor | None,
    residual_is_x: bool,
    scale: float,
    activation: str,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dx, ddown, ddown_bias, dup, dup_bias, dscale: those that `needs` names, None for the others."""
    call = new_call(x, (tuple(down_spec), tuple(up_spec)), down, down_bias, up, up_bias)
    _set_options(call, learnt_scale, seed, residual_is_x, scale, activation, dropout_p)
    *grads, dscale = _backward(call, dy, waist, (x, down, down_bias, up, up_bias, learnt_scale), needs)
    return *grads, None if dscale is None else dscale * scale


def tt_linear_fwd(x: Tensor, cores: Tensor, spec: Sequence[int], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the waist."""
    call = new_call(x, (tuple(spec),), cores, None, None, bias)
    return _forward(call, x, x.dtype, TTShape.from_spec(tuple(spec)).waist)


def tt_linear_bwd(
    dy: Tensor,
    x: Tensor,
    waist: Tensor,
    cores: Tensor,
    spec: Sequence[int],
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dx, dcores, dbias: those that `needs` names, None for the others."""
    call = new_call(x, (tuple(spec),), cores, None, None, bias)
    needs_dx, needs_dcores, needs_dbias = needs
    every = needs_dx, needs_dcores, False, False, needs_dbias, False
    dx, dcores, _, _, dbias, _ = _backward(call, dy, waist, (x, cores, None, None, bias, None), every)
    return dx, dcores, dbias


def _set_options(
    call: Call,
    learnt_scale: Tensor | None,
    seed: Tensor | None,
    residual_is_x: bool,
    scale: float,
    activation: str,
    dropout_p: float,
) -> None:
    """What an adapter has and a single train has not."""
    call.residual_is_x, call.activation, call.dropout_p = residual_is_x, ACTIVATIONS[activation], dropout_p
    call.scale = scale if learnt_scale is None else scale * learnt_scale.item()
    if seed is not None:
        call.seed = int(seed.item()) & 2**64 - 1


def _forward(call: Call, x: Tensor, dtype: torch.dtype, K: int) -> tuple[Tensor, Tensor]:
    """y in `dtype`, and the waist `[N, K]`."""
    y, waist = x.new_empty(*x.shape[:-1], call.O, dtype=dtype), fp32_room((call.N, K))
    call.y, call.y_bf16, call.waist = y.data_ptr(), _is_bf16(y), waist.data_ptr()
    run(call, backward=False)
    return y, waist


def _backward(
    call: Call, dy: Tensor, waist: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, down, down_bias, up, up_bias and the scale, in their dtypes."""
    (dy, call.ldy), waist = rows_of(dy), waist.contiguous()
    call.dy, call.y_bf16, call.waist = dy.data_ptr(), _is_bf16(dy), waist.data_ptr()
    wanted = [t if need else None for t, need in zip(tensors, needs, strict=True)]
    x, *parameters = wanted
    dx = None if x is None else x.new_empty(x.shape)
    grads = [None if t is None else fp32_room(t.shape) for t in parameters]
    call.needs = sum(1 << bit for bit, t in enumerate(wanted) if t is not None)
    call.dx, call.ddown, call.ddown_bias, call.dup, call.dup_bias, call.dscale = map(address, (dx, *grads))
    run(call, backward=True)
    return [dx, *map(_in_its_dtype, grads, parameters)]


def _in_its_dtype(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient as its parameter wants it."""
    return grad if grad is None or parameter is None else grad.to(parameter.dtype)


def _is_bf16(t: Tensor) -> bool:
    """Bf16, not fp32."""
    return t.dtype is torch.bfloat16
