"""tt_adapter and tt_lora: the launches of `tt_adapter_forward` and of `tt_adapter_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from loretta_kernels._triton import launch
from loretta_kernels._triton.core_grads import sum_blocks
from loretta_kernels._triton.launch import Launch
from loretta_kernels._triton.operands import (
    architecture,
    block_constants,
    contiguous,
    grads_like,
    needed,
    rows_of,
    seed_on,
)
from loretta_kernels._triton.plan import MAX_PROGRAMS, MAX_WORKSPACES, adapter_plan
from loretta_kernels._triton.tt_adapter_backward import _tt_adapter_bwd_kernel, _tt_adapter_sum_kernel
from loretta_kernels._triton.tt_adapter_forward import _tt_adapter_fwd_kernel
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
    base = x if residual_is_x else residual
    y_dtype = x.dtype if base is None else torch.promote_types(x.dtype, base.dtype)
    down_shape, up_shape = TTShape.from_spec(tuple(down_spec)), TTShape.from_spec(tuple(up_spec))
    plan = adapter_plan(down_shape, up_shape, y_dtype.itemsize, architecture(x.device))
    LD, RD, LU, RU = plan.sides
    rows = rows_of(x, LD.size)
    rows_of_base = rows if residual_is_x else None if residual is None else rows_of(residual, RU.size)
    N, blocks = len(rows), plan.forward_of(len(rows))
    y = x.new_empty(*x.shape[:-1], RU.size, dtype=y_dtype)
    waist = x.new_empty(N, LD.K, dtype=torch.float32)
    if N == 0:
        return y, waist
    grid = plan.programs(N, blocks), plan.parts(N, blocks, RU)
    launch.execute(
        Launch(
            _tt_adapter_fwd_kernel,
            grid,
            {
                "x_ptr": rows,
                "residual_ptr": rows_of_base,
                "y_ptr": y,
                "waist_ptr": waist,
                "down_ptr": down.contiguous(),
                "down_bias_ptr": contiguous(down_bias),
                "up_ptr": up.contiguous(),
                "up_bias_ptr": contiguous(up_bias),
                "learnt_scale_ptr": learnt_scale,
                "seed_ptr": seed_on(x.device, seed) if dropout_p else None,
                "tables_ptr": waist.new_empty(prod(grid) * plan.table_size),
                "N": N,
                "stride_xn": rows.stride(0),
                "stride_rn": 0 if rows_of_base is None else rows_of_base.stride(0),
                "scale": scale,
            },
            {
                "LD": LD,
                "RD": RD,
                "LU": LU,
                "RU": RU,
                "TABLE_SIZE": plan.table_size,
                "BLOCK_B": plan.block_b,
                "ACTIVATION": activation,
                "DROPOUT_P": dropout_p,
                **block_constants(plan, blocks, x.dtype, y_dtype),
            },
            blocks.warps,
            blocks.stages,
        )
    )
    return y, waist


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
    down_shape, up_shape = TTShape.from_spec(tuple(down_spec)), TTShape.from_spec(tuple(up_spec))
    plan = adapter_plan(down_shape, up_shape, dy.dtype.itemsize, architecture(x.device))
    LD, RD, LU, RU = plan.sides
    rows, rows_of_dy = rows_of(x, LD.size), rows_of(dy, RU.size)
    N, blocks = len(rows), plan.backward_of(len(rows))
    grads = dx, ddown, ddown_bias, dup, dup_bias, dscale = grads_like(
        (x, down, down_bias, up, up_bias, learnt_scale), needs, N
    )
    if N == 0:
        return grads
    atomic = not torch.are_deterministic_algorithms_enabled()
    programs = plan.programs(N, blocks, MAX_PROGRAMS if atomic else MAX_WORKSPACES)
    parts = plan.parts(N, blocks, LD, RU)
    parameters = {
        "down_ptr": down.contiguous(),
        "up_ptr": up.contiguous(),
        "up_bias_ptr": contiguous(up_bias),
        "learnt_scale_ptr": learnt_scale,
        **needed(
            {
                "ddown_ptr": ddown,
                "ddown_bias_ptr": ddown_bias,
                "dup_ptr": dup,
                "dup_bias_ptr": dup_bias,
                "dscale_ptr": dscale,
            },
            needs[1:],
        ),
        "grads_ptr": waist.new_zeros((1 if atomic else programs) * plan.grad_size),
        "scratch_ptr": waist.new_empty(plan.scratch_size),
        "scale": scale,
    }
    constants = {
        "LD": LD,
        "RD": RD,
        "LU": LU,
        "RU": RU,
        "GRAD_SIZE": plan.grad_size,
        "DSCALE": plan.dscale,
        "ARRIVED": plan.arrived,
    }
    products = block_constants(plan, blocks, x.dtype, dy.dtype)
    launch.execute(
        Launch(
            _tt_adapter_bwd_kernel,
            (programs, parts),
            {
                **parameters,
                "dy_ptr": rows_of_dy,
                "x_ptr": rows,
                "waist_ptr": waist,
                "down_bias_ptr": contiguous(down_bias),
                "seed_ptr": seed_on(x.device, seed) if dropout_p else None,
                "dx_ptr": dx if needs[0] else None,
                "tables_ptr": waist.new_empty(programs * parts * plan.table_size),
                "N": N,
                "stride_dyn": rows_of_dy.stride(0),
                "stride_xn": rows.stride(0),
            },
            {
                **constants,
                **products,
                "TABLE_SIZE": plan.table_size,
                "BLOCK_B": plan.block_b,
                "ACTIVATION": activation,
                "DROPOUT_P": dropout_p,
                "RESIDUAL_IS_X": residual_is_x,
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
                _tt_adapter_sum_kernel,
                (sum_blocks(plan.arrived),),
                {**parameters, "sums_ptr": waist.new_zeros(plan.grad_size), "programs": programs},
                {**constants, "PRECISION": products["PRECISION"]},
                blocks.warps,
                1,
            )
        )
    return grads
