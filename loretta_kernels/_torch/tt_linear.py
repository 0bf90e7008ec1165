"""y = x · L · R + b through the waist s = x · L, and its gradients.

dR = sᵀ · dy      db = sum(dy)      ds = dy · Rᵀ      dL = xᵀ · ds      dx = ds · Lᵀ
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels._torch.rows import compute_dtype, from_waist, input_grads, output_grads, to_waist
from loretta_kernels._torch.train import contract
from loretta_kernels.shape import TTShape


def tt_linear_fwd(x: Tensor, cores: Tensor, spec: Sequence[int], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the waist."""
    shape = TTShape.from_spec(tuple(spec))
    rows_of_x = x.reshape(-1, shape.in_features)
    train = contract(cores, shape, compute_dtype(x))
    s = to_waist(rows_of_x, train.L)
    return from_waist(None, s, train.R, None if bias is None else bias.to(s.dtype), x.dtype, x.shape[:-1]), s


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
    s = waist if bias is None else torch.cat([waist, waist.new_ones(len(waist), 1)], dim=1)
    ds, dR = output_grads(
        dy.reshape(-1, shape.out_features), s, train.R, needs_dx or needs_dcores, needs_dcores or needs_dbias
    )
    dx, dLt = input_grads(x.reshape(-1, shape.in_features), ds, train.L, needs_dx, needs_dcores)
    return (
        dx.view(x.shape) if needs_dx else dx,
        train.dcores(dLt, dR[: shape.waist]).to(cores.dtype) if needs_dcores else x.new_empty(0),
        dR[shape.waist].to(bias.dtype, copy=True) if bias is not None and needs_dbias else x.new_empty(0),
    )
