"""The operator on rows that use different adapters: the formulas of `adapter`, batched over groups.

Groups of one size are one batched product, and nothing is padded. They are taken as many at a time as stay in the
cache, so that a block of rows is gathered once for all that is made of it. The trains of the adapters in use are
contracted together, and so are their gradients; G counts these adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from loretta_kernels._torch.activations import ACTIVATIONS
from loretta_kernels._torch.adapter import has_hidden
from loretta_kernels._torch.contraction import Contraction, contract_stack
from loretta_kernels._torch.rows import GPU_BLOCK
from loretta_kernels.call import Call
from loretta_kernels.groups import Sorted, sorted_of
from loretta_kernels.philox import dropout_factor

CPU_BLOCK = 1 << 17  # elements of rows that stay in a CPU core's cache


@dataclass(frozen=True)
class _Parameters:
    """What depends on the parameters of the adapters in use, as in `adapter`, each with G for its first dimension."""

    down: Contraction
    last: Contraction
    hidden_bias: Tensor | None
    bias: Tensor | None
    scale: float | Tensor
    U: Tensor
    M: Tensor
    ones: Tensor | None
    R: Tensor

    def z(self, a: Tensor, groups: slice) -> Tensor:
        """a · M, with a column of ones where there is a bias."""
        return a @ self.M[groups] if self.ones is None else torch.baddbmm(self.ones, a, self.M[groups])


@dataclass(frozen=True)
class _Block:
    """Rows of whole groups of one size, or some rows of one group.

    Attributes:
        groups: which groups, a slice.
        rows: their rows: a slice where they lie side by side, otherwise their numbers.
        numbers: the numbers.
        begins: whether it has the first rows of its groups.
    """

    groups: slice
    rows: slice | Tensor
    numbers: Tensor
    begins: bool

    @property
    def count(self) -> int:
        return self.groups.stop - self.groups.start

    def of(self, x: Tensor) -> Tensor:
        """The block's rows of `x [N, F]`, as `[groups, rows of each, F]`."""
        mine = x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)
        return mine.view(self.count, -1, x.shape[1])

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write `value [groups, rows of each, F]` to the block's rows of x."""
        value = value.reshape(-1, x.shape[1])
        if isinstance(self.rows, slice):
            x[self.rows].copy_(value)
        else:
            x.index_copy_(0, self.rows, value.to(x.dtype))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and the waist s `[N, K]`; of rows without an adapter the residual, and 0."""
    waist = call.x.new_zeros(prod(call.x.shape[:-1]), call.down_shape.waist, dtype=call.sum_dtype)
    return _y(call, waist), waist


def infer(call: Call) -> Tensor:
    """y alone, for a call without gradients."""
    return _y(call, None)


def _y(call: Call, waist: Tensor | None) -> Tensor:
    """y; the waist is written where there is one."""
    known, x, dtype = _sorted(call), _rows_of(call.x), call.sum_dtype
    base = x if call.residual_is_x else None if call.residual is None else _rows_of(call.residual)
    y = x.new_empty(*call.x.shape[:-1], call.out_features, dtype=call.y_dtype)  # no view, as in `adapter`
    rows_of_y = y.view(-1, call.out_features)
    _put_rest(rows_of_y, known, call, base)
    if not known.present:
        return y
    p = _parameters(call, known)
    # One product fewer, for parameters that stay the same.
    folded = waist is None and p.bias is None and not has_hidden(call)
    R = p.last.derived("M · R", (p.M,), lambda: p.M @ p.R) if folded else p.R
    for block in _blocks(call, known):
        mine, groups = block.of(x), block.groups
        s = _product_with_t(_dropped(call, block, mine), p.down.Lt[groups])
        if waist is not None:
            block.put(waist, s)
        _, a = _hidden(call, p, block, s)
        z = a if folded else p.z(a, groups)
        own = mine if base is x else None if base is None else block.of(base)
        if own is not None and own.dtype is dtype:
            gathered = isinstance(block.rows, Tensor)  # else it is a view
            out = own.baddbmm_(z, R[groups]) if gathered else torch.baddbmm(own, z, R[groups])
        else:
            out = z @ R[groups]
            if own is not None:
                out += own
        block.put(rows_of_y, out)
    return y


def backward(call: Call, waist: Tensor, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dx, ddown, ddown_bias, dup, dup_bias, dscale: those that `needs` names, None for the others."""
    needs_dx, needs_ddown, needs_ddown_bias, needs_dup, needs_dup_bias, needs_dscale = needs
    known, dtype = _sorted(call), call.sum_dtype
    rows_of_x, rows_of_dy = _rows_of(call.x), _rows_of(dy)
    dx = rows_of_x.new_empty(rows_of_x.shape) if needs_dx else None
    grads: list[Tensor | None] = [None if dx is None else dx.view(call.x.shape)]
    grads += [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if t is not None and need else None
        for t, need in zip(call.differentiable[1:], needs[1:], strict=True)
    ]
    if dx is not None:
        _put_rest(dx, known, call, rows_of_dy if call.residual_is_x else None)
    if not known.present or not len(rows_of_x):
        return tuple(grads)
    p = _parameters(call, known)
    one_train, is_hidden, G, K = call.up is None, has_hidden(call), len(known.present), p.U.shape[2]
    needs_bias = p.bias is not None and (needs_ddown_bias if one_train else needs_dup_bias)
    sums = {
        "R": torch.empty_like(p.R),
        "U": torch.empty_like(p.U),
        "Lt": torch.empty_like(p.down.Lt) if needs_ddown else None,
        "R_down": torch.empty_like(p.down.R) if is_hidden else None,
        "b_down": p.down.R.new_zeros(G, call.down_shape.out_features) if is_hidden else None,
    }

    def add(name: str, block: _Block, left: Tensor, right: Tensor) -> None:
        total = sums[name]
        if total is None:
            return
        if block.begins:
            torch.bmm(left.mT, right, out=total[block.groups])
        else:
            total[block.groups].baddbmm_(left.mT, right)

    for block in _blocks(call, known):
        s, dy_block = block.of(waist), block.of(rows_of_dy).to(dtype)
        h, a = _hidden(call, p, block, s)
        add("R", block, p.z(a, block.groups), dy_block)
        dz = _product_with_t(dy_block, p.R[block.groups, :K])
        add("U", block, a, dz)
        ds = dz @ p.M[block.groups, :, :K].mT
        if h is not None:
            dh = ACTIVATIONS[call.activation][1](ds, h, a)
            add("R_down", block, s, dh)
            if sums["b_down"] is not None:
                sums["b_down"][block.groups] += dh.sum(1)
            ds = dh @ p.down.R[block.groups].mT
        x = _dropped(call, block, block.of(rows_of_x)) if needs_ddown else None
        if x is not None:
            add("Lt", block, ds, x)
        if dx is not None:
            part = ds @ p.down.Lt[block.groups]
            if call.seed is not None:
                part *= _factor(call, block, part)
            block.put(dx, part.add_(dy_block) if call.residual_is_x else part)

    dR, dU = sums["R"], sums["U"]
    assert dR is not None
    assert dU is not None
    present = known.present_on(call.x.device)

    def store(at: int, value: Tensor) -> None:
        if (grad := grads[at]) is not None:
            grad.index_copy_(0, present, value.to(grad.dtype))

    if needs_bias:
        store(
            2 if one_train else 4, p.scale[:, :, 0] * dR[:, -1] if isinstance(p.scale, Tensor) else p.scale * dR[:, -1]
        )
    if needs_dscale:
        total = (dU * p.U).sum((1, 2))
        if p.bias is not None:
            total = total + (dR[:, -1] * p.bias).sum(1)
        store(5, call.scale * total)
    dU, dR = dU * p.scale, dR[:, :K]
    if is_hidden:
        dR_down, dL_up = sums["R_down"], dU
        assert sums["b_down"] is not None
        store(2, sums["b_down"])
    elif one_train:
        dR_down, dL_up = dR, None
    else:
        dR_down, dL_up = dU @ p.last.L.mT, p.down.R.mT @ dU
    if needs_dup and dL_up is not None:
        store(3, p.last.dcores(dL_up.mT, dR))
    if sums["Lt"] is not None and dR_down is not None:
        store(1, p.down.dcores(sums["Lt"], dR_down))
    return tuple(grads)


def _sorted(call: Call) -> Sorted:
    assert call.adapter is not None
    return sorted_of(call.adapter, len(call.down))


def _rows_of(x: Tensor) -> Tensor:
    """x as `[N, F]`."""
    return x.reshape(-1, x.shape[-1])


def _blocks(call: Call, known: Sorted) -> list[_Block]:
    """The blocks of the rows that have an adapter."""
    each, device = call.rows_each, call.x.device
    most = max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // max(call.x.shape[-1], call.out_features))
    blocks: list[_Block] = known.made(("blocks", each, most, device), lambda: list(_cut(known, each, most, device)))
    return blocks


def _cut(known: Sorted, each: int, most: int, device: torch.device) -> Iterator[_Block]:
    """Blocks of at most so many rows."""
    numbers = known.rows(each, device)

    def block(first: int, last: int, start: int, stop: int) -> _Block:
        adjacent = known.first_if_adjacent(start, stop, each)
        rows = numbers[start:stop] if adjacent is None else slice(adjacent, adjacent + stop - start)
        return _Block(slice(first, last), rows, numbers[start:stop], start == known.starts[first] * each)

    for run in known.runs:
        size = run.size * each
        together = max(1, most // max(1, size))
        for first in range(run.first, run.last, together):
            last = min(first + together, run.last)
            stop = known.starts[last] * each
            for start in range(known.starts[first] * each, stop, most if together == 1 else max(1, together * size)):
                yield block(first, last, start, min(start + most, stop) if together == 1 else stop)


def _put_rest(y: Tensor, known: Sorted, call: Call, base: Tensor | None) -> None:
    """base, or 0, in the rows of y that have no adapter."""
    each = call.rows_each
    if known.used < len(known.order):
        rows = known.rows(each, y.device)[known.used * each :]
        y.index_copy_(0, rows, y.new_zeros(len(rows), y.shape[1]) if base is None else base[rows].to(y.dtype))


def _parameters(call: Call, known: Sorted) -> _Parameters:
    """The parameters of the adapters in use, contracted."""
    dtype, present = call.sum_dtype, known.present_on(call.x.device)

    def chosen(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().index_select(0, present).to(dtype)

    down = contract_stack(call.down, present, call.down_shape, dtype)
    scale: float | Tensor = call.scale
    scale_source: object = call.scale
    if (learnt := chosen(call.learnt_scale)) is not None:
        scale, scale_source = (scale * learnt)[:, None, None], (call.learnt_scale, present)
    if call.up is None or call.up_shape is None:
        last, hidden_bias, bias_source = down, None, call.down_bias
        U = down.derived("U", (), lambda: torch.eye(len(down.R[0])).to(down.R).expand(len(present), -1, -1))
    else:
        last, hidden_bias, bias_source = (
            contract_stack(call.up, present, call.up_shape, dtype),
            chosen(call.down_bias),
            call.up_bias,
        )
        U = last.L if has_hidden(call) else last.derived("U", (down,), lambda: down.R @ last.L)
    M, ones = last.derived(
        "M", (U, scale_source, call.scale, bias_source is None), lambda: _scaled(U, scale, bias_source is not None)
    )
    bias, R = chosen(bias_source), last.R
    if bias is not None:
        sources = (bias_source, present), scale_source, call.scale
        R = last.derived("R", sources, lambda: torch.cat([last.R, bias[:, None] * scale], dim=1))
    return _Parameters(down, last, hidden_bias, bias, scale, U, M, ones, R)


def _scaled(U: Tensor, scale: float | Tensor, with_ones: bool) -> tuple[Tensor, Tensor | None]:
    """As in `adapter`."""
    if not with_ones:
        return U * scale, None
    M = F.pad(U * scale, (0, 1))
    ones = M.new_zeros(1, 1, M.shape[2])
    ones[..., -1] = 1
    return M, ones


def _hidden(call: Call, parameters: _Parameters, block: _Block, s: Tensor) -> tuple[Tensor | None, Tensor]:
    """h and a; s in the place of a where there is no h."""
    if not has_hidden(call):
        return None, s
    bias, R = parameters.hidden_bias, parameters.down.R[block.groups]
    h = s @ R if bias is None else torch.baddbmm(bias[block.groups, None], s, R)
    return h, ACTIVATIONS[call.activation][0](h)


def _product_with_t(x: Tensor, Lt: Tensor) -> Tensor:
    """x · Ltᵀ, in the form that reads x along its rows: see `rows`."""
    return (Lt @ x.mT).mT


def _dropped(call: Call, block: _Block, x: Tensor) -> Tensor:
    """drop(x) in the dtype of sums."""
    wide = x.to(call.sum_dtype)
    return wide if call.seed is None else wide * _factor(call, block, wide)


def _factor(call: Call, block: _Block, x: Tensor) -> Tensor:
    """What dropout multiplies the block by: each row as it would be without groups."""
    assert call.seed is not None
    return dropout_factor(call.seed, 0, block.numbers, x.shape[-1], call.dropout_p, x.dtype).view(x.shape)
