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
    chunks,
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
    R = up_train.R if up_bias is None else with_bias(up_train.R, up_bias)
    dropout = _dropout(dropout_p, seed, x.device)

    # No view: autograd forbids changing a Function's output in place when it is one, as models do.
    y = x.new_empty(*x.shape[:-1], up_shape.out_features, dtype=y_dtype)
    s = x.new_empty(len(rows_of_x), down_shape.waist, dtype=dtype)
    rows_of_y, rows_of_base = y.view(-1, y.shape[-1]), None if base is None else base.reshape(-1, y.shape[-1])
    for rows in chunks(rows_of_x, dtype, dropout):
        to_waist(rows_of_x[rows], down_train.Lt, s[rows], dropout)
        z = act(_hidden(s[rows], down_train, down_bias)) @ up_train.L
        z = _times(total, z if up_bias is None else with_ones(z))
        from_waist(rows_of_y[rows], None if rows_of_base is None else rows_of_base[rows], z, R)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, ddown, ddown_bias, dup, dup_bias, dscale: those that `needs` names, an empty tensor for the others."""
    needs_dx, needs_ddown, needs_ddown_bias, needs_dup, needs_dup_bias, needs_dscale = needs
    needs_dh = needs_dx or needs_ddown or needs_ddown_bias
    down_shape, up_shape = TTShape.from_spec(tuple(down_spec)), TTShape.from_spec(tuple(up_spec))
    dtype, rows_of_x, rows_of_dy = compute_dtype(x), x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    down_train, up_train = contract(down, down_shape, dtype), contract(up, up_shape, dtype)
    act, dact = ACTIVATIONS[activation]
    total, dropout = _total(scale, learnt_scale, dtype), _dropout(dropout_p, seed, x.device)
    has_up_bias, needs_dR = up_bias is not None, needs_dup or needs_dup_bias or needs_dscale

    dx = x.new_empty(x.shape) if needs_dx else None
    rows_of_dx = None if dx is None else dx.view(rows_of_x.shape)
    dR_up = waist.new_zeros(up_shape.waist + has_up_bias, up_shape.out_features) if needs_dR else None
    dLt_down = torch.zeros_like(down_train.Lt) if needs_ddown else None
    dLt_up = dR_down = dbias = None
    for rows in chunks(rows_of_x, dtype, dropout):
        s, dy_rows = waist[rows], rows_of_dy[rows]
        h = _hidden(s, down_train, down_bias)
        a = act(h)
        z = a @ up_train.L
        dz = torch.empty_like(z) if needs_dh or needs_dup else None
        output_grads(dz, dR_up, dy_rows, with_ones(z) if has_up_bias else z, up_train.R)
        if dz is None:
            continue
        dz = _times(total, dz)
        if needs_dup:
            dLt_up = _plus(dLt_up, dz.t() @ a)
        if not needs_dh:
            continue
        dh = dact(dz @ up_train.L.t(), h, a)
        if needs_ddown_bias:
            dbias = _plus(dbias, dh.sum(0))
        if needs_ddown:
            dR_down = _plus(dR_down, s.t() @ dh)
        if needs_dx or needs_ddown:
            input_grads(
                None if rows_of_dx is None else rows_of_dx[rows],
                dLt_down,
                dy_rows if residual_is_x else None,
                rows_of_x[rows],
                dh @ down_train.R.t(),
                down_train.Lt,
                dropout,
            )

    ddown = dup = ddown_bias = dup_bias = dscale = None
    if dR_up is not None:
        if needs_dscale and learnt_scale is not None:
            dtotal = (dR_up[: up_shape.waist] * up_train.R).sum()
            if up_bias is not None:
                dtotal = dtotal + dR_up[-1] @ up_bias.to(dtype)
            dscale = (scale * dtotal).to(learnt_scale.dtype).reshape(learnt_scale.shape)
        dR_up = _times(total, dR_up)
        if dLt_up is not None:
            dup = up_train.dcores(dLt_up, dR_up[: up_shape.waist]).to(up.dtype)
        if up_bias is not None and needs_dup_bias:
            dup_bias = dR_up[-1].to(up_bias.dtype, copy=True)
    if down_bias is not None and dbias is not None:
        ddown_bias = dbias.to(down_bias.dtype)
    if dLt_down is not None and dR_down is not None:
        ddown = down_train.dcores(dLt_down, dR_down).to(down.dtype)
    dx, ddown, ddown_bias, dup, dup_bias, dscale = (
        x.new_empty(0) if grad is None else grad for grad in (dx, ddown, ddown_bias, dup, dup_bias, dscale)
    )
    return dx, ddown, ddown_bias, dup, dup_bias, dscale


def _hidden(s: Tensor, down_train: Train, bias: Tensor | None) -> Tensor:
    """h = s · R_d + b_d."""
    return s @ down_train.R if bias is None else torch.addmm(bias.to(s.dtype), s, down_train.R)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum over the chunks so far."""
    return part if total is None else total.add_(part)


def _total(scale: float, learnt_scale: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """The number that the adapter's output is multiplied by."""
    return scale if learnt_scale is None else scale * learnt_scale.to(dtype).reshape(())


def _times(total: float | Tensor, t: Tensor) -> Tensor:
    """total · t; t itself for a total of one."""
    return t if isinstance(total, float) and total == 1.0 else t * total


def _dropout(p: float, seed: Tensor | None, device: torch.device) -> Dropout | None:
    """The dropout of x, or None for none."""
    return Dropout(p, seed, device) if p and seed is not None else None
