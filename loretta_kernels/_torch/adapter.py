"""The operator and its gradients through the waists of the two trains.

s = drop(x) · L_d     h = s · R_d + b_d     a = act(h)     z = a · M     y = residual + z · R_u + scale · b_u

with M = scale · U and U = L_u. Without an activation and b_d, a is s and U = R_d · L_u; without a second train, a is s,
U = 1, and R_u, b_u are those of the first.

dz = dy · R_uᵀ          dR_u = zᵀ · dy       db_u = scale · sum(dy)
da = dz · Mᵀ            dU = scale · aᵀ · dz      dscale = <aᵀ · dz, U> + <sum(dy), b_u>
dh = da · act'(h)       dR_d = sᵀ · dh       db_d = sum(dh)
ds = dh · R_dᵀ          dL_d = drop(x)ᵀ · ds      dx = [residual is x] · dy + drop'(ds · L_dᵀ)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loretta_kernels._torch.activations import ACTIVATIONS
from loretta_kernels._torch.contraction import Contraction, contract
from loretta_kernels._torch.rows import Dropout, from_waist, input_grads, output_grads, to_waist
from loretta_kernels.call import Call


class _Parameters(NamedTuple):
    """What depends on a call's parameters alone.

    With a bias b_u, `M [.., K + 1]` gives z a column of ones by `ones [K + 1]`, and `R [K + 1, O]` has scale · b_u for
    its last row: then the bias costs no pass over y or dy of its own.
    """

    down: Contraction
    last: Contraction
    bias: Tensor | None
    scale: float | Tensor
    U: Tensor
    M: Tensor
    ones: Tensor | None
    R: Tensor

    def z(self, a: Tensor) -> Tensor:
        """a · M, with a column of ones where there is a bias."""
        return a @ self.M if self.ones is None else torch.addmm(self.ones, a, self.M)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and the waist s `[N, K]`."""
    x, O, parameters = call.x, call.out_features, parameters_of(call)
    s = to_waist(x.reshape(-1, x.shape[-1]), parameters.down.Lt, _dropout(call))
    _, a = _hidden(call, parameters, s)
    # No view: autograd forbids changing a Function's output in place when it is one, as models do.
    y = x.new_empty(*x.shape[:-1], O, dtype=call.y_dtype)
    base = x if call.residual_is_x else call.residual
    from_waist(y.view(-1, O), None if base is None else base.reshape(-1, O), parameters.z(a), parameters.R)
    return y, s


def backward(call: Call, waist: Tensor, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dx, ddown, ddown_bias, dup, dup_bias, dscale: those that `needs` names, None for the others."""
    needs_dx, needs_ddown, needs_ddown_bias, needs_dup, needs_dup_bias, needs_dscale = needs
    one_train, s, parameters = call.up is None, waist, parameters_of(call)
    x, down, last, K = call.x, parameters.down, parameters.last, parameters.U.shape[1]
    rows_of_dy = dy.reshape(-1, dy.shape[-1])
    ddown = ddown_bias = dup = dup_bias = dscale = None

    h, a = _hidden(call, parameters, s)
    needs_dh = needs_dx or needs_ddown or (needs_ddown_bias and not one_train)
    needs_bias = needs_ddown_bias if one_train else needs_dup_bias
    needs_train = needs_ddown if one_train else needs_dup
    dz, dR = output_grads(
        rows_of_dy,
        parameters.z(a),
        parameters.R[:K],
        needs_dh or needs_dup or needs_dscale,
        needs_train or needs_bias or needs_dscale,
    )
    if needs_bias and parameters.bias is not None and dR is not None:
        dbias = (dR[-1] * parameters.scale).to(parameters.bias.dtype)
        ddown_bias, dup_bias = (dbias, None) if one_train else (None, dbias)
    if dz is None or not (needs_dh or needs_dup or needs_dscale):
        return None, None, ddown_bias, None, dup_bias, None

    dU_unscaled = a.t() @ dz
    if needs_dscale and call.learnt_scale is not None:
        dtotal = (dU_unscaled * parameters.U).sum()
        if parameters.bias is not None and dR is not None:
            dtotal = dtotal + dR[-1] @ parameters.bias.to(dR.dtype)
        dscale = (call.scale * dtotal).to(call.learnt_scale.dtype).reshape(call.learnt_scale.shape)
    dU, M = dU_unscaled * parameters.scale, parameters.M[:, :K]
    dR_down: Tensor | None
    dL_up: Tensor | None = None
    if h is not None:
        da = dz @ M.t()
        dh = ACTIVATIONS[call.activation][1](da, h, a)
        ds, dR_down, dL_up = dh @ down.R.t(), s.t() @ dh, dU
        if needs_ddown_bias and call.down_bias is not None:
            ddown_bias = dh.sum(0).to(call.down_bias.dtype)
    elif one_train:
        ds, dR_down = dz @ M.t(), dR
    else:
        ds, dR_down, dL_up = dz @ M.t(), dU @ last.L.t(), down.R.t() @ dU
    if needs_dup and call.up is not None and dL_up is not None and dR is not None:
        dup = last.dcores(dL_up.t(), dR[:K]).to(call.up.dtype)
    dx = None
    if needs_dx or needs_ddown:
        base = rows_of_dy if call.residual_is_x else None
        rows = x.reshape(-1, x.shape[-1])
        dx, dLt = input_grads(rows, ds, down.Lt, needs_dx, needs_ddown, base=base, dropout=_dropout(call))
        if dLt is not None and dR_down is not None:
            ddown = down.dcores(dLt, dR_down[: down.shape.waist]).to(call.down.dtype)
    return None if dx is None else dx.view(x.shape), ddown, ddown_bias, dup, dup_bias, dscale


def parameters_of(call: Call) -> _Parameters:
    """The parameters of a call, contracted."""
    dtype = call.sum_dtype
    down = contract(call.down, call.down_shape, dtype)
    scale: float | Tensor = call.scale
    if call.learnt_scale is not None:
        scale = scale * call.learnt_scale.detach().to(dtype).reshape(())
    if call.up is None or call.up_shape is None:
        last, bias = down, call.down_bias
        U = down.derived("U", (), lambda: torch.eye(len(down.R)).to(down.R))
    else:
        last, bias = contract(call.up, call.up_shape, dtype), call.up_bias
        U = last.L if has_hidden(call) else last.derived("U", (down,), lambda: down.R @ last.L)
    biased = bias is not None
    factors = call.learnt_scale, call.scale  # not their product, whose place in memory the next one may get
    M, ones = last.derived("M", (U, *factors, biased), lambda: _scaled(U, scale, biased))
    R = last.R
    if bias is not None:
        R = last.derived("R", (bias, *factors), lambda: _with_row(last.R, bias.to(dtype) * scale))
    return _Parameters(down, last, bias, scale, U, M, ones, R)


def has_hidden(call: Call) -> bool:
    """Whether an activation or a bias lies between the two trains, so that R_d · L_u cannot be computed beforehand."""
    return call.up is not None and (call.activation != "identity" or call.down_bias is not None)


def _hidden(call: Call, parameters: _Parameters, s: Tensor) -> tuple[Tensor | None, Tensor]:
    """h and a; s in the place of a where there is no h."""
    if not has_hidden(call):
        return None, s
    bias, R = call.down_bias, parameters.down.R
    h = s @ R if bias is None else torch.addmm(bias.to(s.dtype), s, R)
    return h, ACTIVATIONS[call.activation][0](h)


def _scaled(U: Tensor, scale: float | Tensor, with_ones: bool) -> tuple[Tensor, Tensor | None]:
    """scale · U; with a column of zeros for the bias, and the vector that turns it into ones."""
    if not with_ones:
        return U * scale, None
    M = torch.cat([U * scale, U.new_zeros(len(U), 1)], dim=1)
    ones = M.new_zeros(M.shape[1])
    ones[-1] = 1
    return M, ones


def _with_row(R: Tensor, row: Tensor) -> Tensor:
    """R and one more row."""
    return torch.cat([R, row[None]])


def _dropout(call: Call) -> Dropout | None:
    """The dropout of x, or None for none."""
    return None if call.seed is None else Dropout(call.dropout_p, call.seed)
