"""y = x · L · R + b through the waist s = x · L, and its gradients.

dR = sᵀ · dy      db = sum(dy)      ds = dy · Rᵀ      dL = xᵀ · ds      dx = ds · Lᵀ
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loretta_kernels._torch.rows import (
    compute_dtype,
    from_waist,
    input_grads,
    output_grads,
    to_waist,
    with_bias,
    with_ones,
)
from loretta_kernels._torch.train import contract
from loretta_kernels.shape import TTShape


def tt_linear_fwd(x: Tensor, cores: Tensor, spec: Sequence[int], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the waist."""
    shape = TTShape.from_spec(tuple(spec))
    rows_of_x = x.reshape(-1, shape.in_features)
    train = contract(cores, shape, compute_dtype(x))
    s, R = to_waist(rows_of_x, train.Lt), train.R
    y = x.new_empty(*x.shape[:-1], shape.out_features)
    terms = (s, R) if bias is None else (with_ones(s), with_bias(R, bias))
    from_waist(y.view(-1, shape.out_features), None, *terms)
    return y, s


def tt_linear_bwd(
    dy: Tensor,
    x: Tensor,
    waist: Tensor,
    cores: Tensor,
    spec: Sequence[int],
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dcores, dbias: those that `needs` names, None for the others."""
    needs_dx, needs_dcores, needs_dbias = needs
    shape = TTShape.from_spec(tuple(spec))
    train = contract(cores, shape, compute_dtype(x))
    s = waist if bias is None else with_ones(waist)
    rows_of_dy = dy.reshape(-1, shape.out_features)
    ds, dR = output_grads(rows_of_dy, s, train.R, needs_dx or needs_dcores, needs_dcores or needs_dbias)
    dx = dcores = dbias = None
    if ds is not None:
        dx, dLt = input_grads(x.reshape(-1, shape.in_features), ds, train.Lt, needs_dx, needs_dcores)
        dx = None if dx is None else dx.view(x.shape)
        if dLt is not None and dR is not None:
            dcores = train.dcores(dLt, dR[: shape.waist]).to(cores.dtype)
    if bias is not None and needs_dbias and dR is not None:
        dbias = dR[-1].to(bias.dtype, copy=True)
    return dx, dcores, dbias
