"""The launches of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from loretta_kernels._triton import launch
from loretta_kernels._triton.backward_kernel import _backward_kernel, _sum_kernel
from loretta_kernels._triton.core_grads import sum_blocks
from loretta_kernels._triton.forward_kernel import _forward_kernel
from loretta_kernels._triton.launch import Launch
from loretta_kernels._triton.one_pass_kernel import _one_pass_forward_kernel
from loretta_kernels._triton.operands import (
    architecture,
    block_constants,
    contiguous,
    grads_like,
    multiprocessors,
    rows_of,
    triton_dtype,
)
from loretta_kernels._triton.plan import MAX_PROGRAMS, MAX_WORKSPACES, Sides, plan_of
from loretta_kernels.call import Call
from loretta_kernels.philox import threshold


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and the waist `[N, K]`."""
    x, plan = call.x, plan_of(call.down_shape, call.up_shape, call.y_dtype.itemsize, architecture(call.x.device))
    rows = rows_of(x, plan.first.size)
    base = x if call.residual_is_x else call.residual
    rows_of_base = None if base is None else rows if base is x else rows_of(base, plan.last.size)
    N = len(rows)
    y = x.new_empty(*x.shape[:-1], plan.last.size, dtype=call.y_dtype)
    waist = x.new_empty(N, plan.first.K, dtype=torch.float32)
    if N == 0:
        return y, waist
    args = {
        "x_ptr": rows,
        "residual_ptr": rows_of_base,
        "y_ptr": y,
        "waist_ptr": waist,
        **_parameters(call),
        "N": N,
        "stride_xn": rows.stride(0),
        "stride_rn": 0 if rows_of_base is None else rows_of_base.stride(0),
        "scale": call.scale,
    }
    if (form := plan.one_pass) is not None:
        keeps_x = call.residual_is_x and form.same_matrix
        programs = form.programs(N, multiprocessors(x.device))
        constants = {
            "LEVELS": form.levels,
            "BLOCK_N": form.n,
            "BLOCK_I": form.i,
            "BLOCK_O": form.o,
            "DTYPE": triton_dtype(x.dtype),
            "KEEPS_X": keeps_x,
        }
        record = Launch(
            _one_pass_forward_kernel,
            (programs,),
            args
            | {"tables_ptr": waist.new_empty(programs * form.table_size)}
            | ({"residual_ptr": None} if keeps_x else {}),
            {**_constants(call, form), **constants},
            form.warps,
            form.stages,
        )
    else:
        blocks = plan.forward_of(N)
        grid = plan.programs(N, blocks), plan.parts(N, blocks, plan.last)
        record = Launch(
            _forward_kernel,
            grid,
            args | {"tables_ptr": waist.new_empty(prod(grid) * plan.table_size)},
            {
                **_constants(call, plan),
                "BLOCK_B": plan.block_b,
                **block_constants(plan, blocks, x.dtype, call.y_dtype),
            },
            blocks.warps,
            blocks.stages,
        )
    launch.execute(record)
    return y, waist


def backward(call: Call, waist: Tensor, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dx, ddown, ddown_bias, dup, dup_bias, dscale: those that `needs` names, None for the others."""
    x, plan = call.x, plan_of(call.down_shape, call.up_shape, dy.dtype.itemsize, architecture(call.x.device))
    rows, rows_of_dy = rows_of(x, plan.first.size), rows_of(dy, plan.last.size)
    N, blocks = len(rows), plan.backward_of(len(rows))
    grads = dx, ddown, ddown_bias, dup, dup_bias, dscale = grads_like(call.differentiable, needs, N)
    if N == 0:
        return grads
    if call.up is None:  # of one train, the output side stands where the second train's does
        dup, ddown_bias, dup_bias = ddown, None, ddown_bias
    atomic = not torch.are_deterministic_algorithms_enabled()
    programs = plan.programs(N, blocks, MAX_PROGRAMS if atomic else MAX_WORKSPACES)
    parts = plan.parts(N, blocks, plan.first, plan.last)
    parameters = _parameters(call)
    shared = {
        **{name: parameters[name] for name in ("down_ptr", "up_ptr", "up_bias_ptr", "learnt_scale_ptr")},
        "ddown_ptr": ddown,
        "ddown_bias_ptr": ddown_bias,
        "dup_ptr": dup,
        "dup_bias_ptr": dup_bias,
        "dscale_ptr": dscale,
        "grads_ptr": waist.new_zeros((1 if atomic else programs) * plan.grad_size),
        "scratch_ptr": waist.new_empty(plan.scratch_size),
        "scale": call.scale,
    }
    constants = {"GRAD_SIZE": plan.grad_size, "DSCALE": plan.dscale, "ARRIVED": plan.arrived}
    products = block_constants(plan, blocks, x.dtype, dy.dtype)
    launch.execute(
        Launch(
            _backward_kernel,
            (programs, parts),
            {
                **shared,
                **parameters,
                "dy_ptr": rows_of_dy,
                "x_ptr": rows,
                "waist_ptr": waist,
                "dx_ptr": dx,
                "tables_ptr": waist.new_empty(programs * parts * plan.table_size),
                "N": N,
                "stride_dyn": rows_of_dy.stride(0),
                "stride_xn": rows.stride(0),
            },
            {
                **constants,
                **products,
                **_constants(call, plan),
                "BLOCK_B": plan.block_b,
                "RESIDUAL_IS_X": call.residual_is_x,
                "ATOMIC": atomic,
                "PARTS": parts,
            },
            blocks.warps,
            blocks.stages,
        )
    )
    if not atomic and any(needs[1:]):
        launch.execute(
            Launch(
                _sum_kernel,
                (sum_blocks(plan.arrived),),
                {**shared, "sums_ptr": waist.new_zeros(plan.grad_size), "programs": programs},
                {**constants, **plan.named_sides, "PRECISION": products["PRECISION"]},
                blocks.warps,
                1,
            )
        )
    return grads


def _parameters(call: Call) -> dict[str, Tensor | None]:
    """The pointers to parameters; of one train, its output side and its bias stand where the second train's do."""
    down, down_bias = call.down.contiguous(), contiguous(call.down_bias)
    up, up_bias = (down, down_bias) if call.up is None else (call.up.contiguous(), contiguous(call.up_bias))
    return {
        "down_ptr": down,
        "down_bias_ptr": None if call.up is None else down_bias,
        "up_ptr": up,
        "up_bias_ptr": up_bias,
        "learnt_scale_ptr": call.learnt_scale,
        "seed_ptr": call.seed,
    }


def _constants(call: Call, plan: Sides) -> dict[str, Any]:
    """The constants that all kernels take."""
    return {
        **plan.named_sides,
        "TABLE_SIZE": plan.table_size,
        "ACTIVATION": call.activation,
        "DROPOUT_P": call.dropout_p,
        "DROPPED": threshold(call.dropout_p),
    }
