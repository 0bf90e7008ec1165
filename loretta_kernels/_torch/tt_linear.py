"""y = x · L · R + b through the waist s = x · L, and its gradients.

dR = sᵀ · dy      db = sum(dy)      ds = dy · Rᵀ      dL = xᵀ · ds      dx = ds · Lᵀ
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels._torch.rows import compute_dtype, from_waist, input_grads, output_grads, to_waist, with_bias, with_ones
from loretta_kernels._torch.train import contract
from loretta_kernels.shape import TTShape


def tt_linear_fwd(x: Tensor, cores: Tensor, spec: Sequence[int], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the waist."""
    shape = TTShape.from_spec(tuple(spec))
    rows_of_x = x.reshape(-1, shape.in_features)
    train = contract(cores, shape, compute_dtype(x))
    s = rows_of_x.new_empty(len(rows_of_x), shape.waist, dtype=train.R.dtype)
    to_waist(rows_of_x, train.Lt, s)
    y = x.new_empty(*x.shape[:-1], shape.out_features)
    rows_of_y = y.view(-1, shape.out_features)
    if bias is None:
        from_waist(rows_of_y, None, s, train.R)
    else:
        from_waist(rows_of_y, None, with_ones(s), with_bias(train.R, bias))
    return y, s


def tt_linear_bwd(
    dy: Tensor,
    x: Tensor,
    waist: Tensor,
    cores: Tensor,
    spec: Sequence[int],
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dcores, dbias: those that `needs` names, an empty tensor for the others."""
    needs_dx, needs_dcores, needs_dbias = needs
    shape = TTShape.from_spec(tuple(spec))
    train = contract(cores, shape, compute_dtype(x))
    rows_of_x, rows_of_dy = x.reshape(-1, shape.in_features), dy.reshape(-1, shape.out_features)
    dx = x.new_empty(x.shape if needs_dx else 0)
    ds = torch.empty_like(waist) if needs_dx or needs_dcores else None
    dR = waist.new_zeros(shape.waist + (bias is not None), shape.out_features)
    dLt = torch.zeros_like(train.Lt) if needs_dcores else None
    output_grads(
        ds, dR if needs_dcores or needs_dbias else None, rows_of_dy, waist if bias is None else with_ones(waist), train.R
    )
    if ds is not None:
        input_grads(dx.view(rows_of_x.shape) if needs_dx else None, dLt, None, rows_of_x, ds, train.Lt)
    return (
        dx,
        x.new_empty(0) if dLt is None else train.dcores(dLt, dR[: shape.waist]).to(cores.dtype),
        dR[-1].to(bias.dtype, copy=True) if bias is not None and needs_dbias else x.new_empty(0),
    )
