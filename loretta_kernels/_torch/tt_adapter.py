"""y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up) through the two waists, and its gradients.

s = drop(x) · L_d     h = s · R_d + b_d     a = act(h)     z = a · L_u     y = residual + scale · (z · R_u + b_u)

dz = scale · dy · R_uᵀ      dR_u = scale · zᵀ · dy      db_u = scale · sum(dy)
da = dz · L_uᵀ              dL_u = aᵀ · dz
dh = da · act'(h)           dR_d = sᵀ · dh              db_d = sum(dh)
ds = dh · R_dᵀ              dL_d = drop(x)ᵀ · ds
dx = [residual is x] · dy + drop'(ds · L_dᵀ)            dscale = <zᵀ · dy, R_u> + <sum(dy), b_u>
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels._torch.activations import ACTIVATIONS
from loretta_kernels._torch.rows import (
    Dropout,
    compute_dtype,
    from_waist,
    input_grads,
    output_grads,
    to_waist,
    with_bias,
    with_ones,
)
from loretta_kernels._torch.train import Train, contract
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
    down_shape, up_shape = TTShape.from_spec(tuple(down_spec)), TTShape.from_spec(tuple(up_spec))
    dtype, rows_of_x = compute_dtype(x), x.reshape(-1, down_shape.in_features)
    down_train, up_train = contract(down, down_shape, dtype), contract(up, up_shape, dtype)
    act, _ = ACTIVATIONS[activation]
    base = rows_of_x if residual_is_x else residual
    y_dtype = x.dtype if base is None else torch.promote_types(x.dtype, base.dtype)
    total = _total(scale, learnt_scale, dtype)

    s = to_waist(rows_of_x, down_train.Lt, _dropout(dropout_p, seed))
    z, R = act(_hidden(s, down_train, down_bias)) @ up_train.L, up_train.R
    if up_bias is not None:
        z, R = with_ones(z), with_bias(R, up_bias)
    # No view: autograd forbids changing a Function's output in place when it is one, as models do.
    y = x.new_empty(*x.shape[:-1], up_shape.out_features, dtype=y_dtype)
    rows_of_base = None if base is None else base.reshape(-1, up_shape.out_features)
    from_waist(y.view(-1, up_shape.out_features), rows_of_base, _times(total, z), R)
    return y, s


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
    needs_dx, needs_ddown, needs_ddown_bias, needs_dup, needs_dup_bias, needs_dscale = needs
    needs_dh = needs_dx or needs_ddown or needs_ddown_bias
    down_shape, up_shape = TTShape.from_spec(tuple(down_spec)), TTShape.from_spec(tuple(up_spec))
    dtype, rows_of_x, rows_of_dy = compute_dtype(x), x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    down_train, up_train = contract(down, down_shape, dtype), contract(up, up_shape, dtype)
    act, dact = ACTIVATIONS[activation]
    total = _total(scale, learnt_scale, dtype)
    dx = ddown = ddown_bias = dup = dup_bias = dscale = None

    h = _hidden(waist, down_train, down_bias)
    a = act(h)
    z = a @ up_train.L
    dz, dR = output_grads(
        rows_of_dy,
        z if up_bias is None else with_ones(z),
        up_train.R,
        needs_dh or needs_dup,
        needs_dup or needs_dup_bias or needs_dscale,
    )
    if needs_dscale and learnt_scale is not None and dR is not None:
        dtotal = (dR[: up_shape.waist] * up_train.R).sum()
        if up_bias is not None:
            dtotal = dtotal + dR[-1] @ up_bias.to(dtype)
        dscale = (scale * dtotal).to(learnt_scale.dtype).reshape(learnt_scale.shape)
    dR = None if dR is None else _times(total, dR)
    if needs_dup_bias and up_bias is not None and dR is not None:
        dup_bias = dR[-1].to(up_bias.dtype, copy=True)
    if dz is not None:
        dz = _times(total, dz)
        if needs_dup and dR is not None:
            dup = up_train.dcores(dz.t() @ a, dR[: up_shape.waist]).to(up.dtype)
    if dz is not None and needs_dh:
        dh = dact(dz @ up_train.L.t(), h, a)
        if needs_ddown_bias and down_bias is not None:
            ddown_bias = dh.sum(0).to(down_bias.dtype)
        dx, dLt = input_grads(
            rows_of_x,
            dh @ down_train.R.t(),
            down_train.Lt,
            needs_dx,
            needs_ddown,
            base=rows_of_dy if residual_is_x else None,
            dropout=_dropout(dropout_p, seed),
        )
        dx = None if dx is None else dx.view(x.shape)
        if dLt is not None:
            ddown = down_train.dcores(dLt, waist.t() @ dh).to(down.dtype)
    return dx, ddown, ddown_bias, dup, dup_bias, dscale


def _hidden(s: Tensor, down_train: Train, bias: Tensor | None) -> Tensor:
    """h = s · R_d + b_d."""
    return s @ down_train.R if bias is None else torch.addmm(bias.to(s.dtype), s, down_train.R)


def _total(scale: float, learnt_scale: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """The number that the adapter's output is multiplied by."""
    return scale if learnt_scale is None else scale * learnt_scale.to(dtype).reshape(())


def _times(total: float | Tensor, t: Tensor) -> Tensor:
    """total · t; t itself for a total of one."""
    return t if isinstance(total, float) and total == 1.0 else t * total


def _dropout(p: float, seed: Tensor | None) -> Dropout | None:
    """The dropout of x, or None for none."""
    return Dropout(p, seed) if p and seed is not None else None
