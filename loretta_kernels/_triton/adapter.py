"""The launches of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from loretta_kernels._triton import launch
from loretta_kernels._triton.backward_kernel import _backward_kernel, _sum_kernel
from loretta_kernels._triton.core_grads import sum_blocks
from loretta_kernels._triton.forward_kernel import _forward_kernel
from loretta_kernels._triton.launch import Launch, Variant
from loretta_kernels._triton.one_pass_kernel import _one_pass_forward_kernel
from loretta_kernels._triton.operands import (
    DTYPES,
    architecture,
    contiguous,
    grads_like,
    largest_group,
    multiprocessors,
    rows_of,
    shares_of,
)
from loretta_kernels._triton.plan import MAX_PROGRAMS, MAX_WORKSPACES, Blocks, Plan, plan_of
from loretta_kernels.call import Call
from loretta_kernels.philox import threshold
from loretta_kernels.shape import TTShape


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and the waist `[N, K]`."""
    x = call.x
    plan, variants = _variants(_forward_kernel, *_what(call, call.y_dtype), call.residual_is_x)
    rows, stride = rows_of(x, plan.first.size)
    base, base_stride = (rows, stride) if call.residual_is_x else (None, 0)
    if call.residual is not None:
        base, base_stride = rows_of(call.residual, plan.last.size)
    N = x.numel() // plan.first.size
    y = x.new_empty(*x.shape[:-1], plan.last.size, dtype=call.y_dtype)
    waist = x.new_empty(N, plan.first.K, dtype=torch.float32)
    if N == 0:
        return y, waist
    grid: tuple[int, ...]
    pointers: dict[str, Tensor | None] = {}
    if plan.one_pass is not None and call.adapter is None:
        variant, grid = variants(None), (plan.one_pass.programs(N, multiprocessors(x.device)),)
        tables = grid[0] * plan.one_pass.table_size
        if variant.constants["KEEPS_X"]:
            base = None
    else:
        blocks = plan.forward_of(largest_group(call, N))
        programs, _, pointers, _ = shares_of(call, plan, N, blocks, MAX_PROGRAMS)
        variant, grid = variants(blocks), (programs, plan.parts(N, blocks, plan.last))
        tables = prod(grid) * plan.table_size
    args = {
        "x_ptr": rows,
        "residual_ptr": base,
        "y_ptr": y,
        "waist_ptr": waist,
        **_parameters(call),
        "tables_ptr": waist.new_empty(tables),
        **pointers,
        "N": N,
        "stride_xn": stride,
        "stride_rn": base_stride,
        "scale": call.scale,
    }
    launch.execute(Launch(variant, grid, args))
    return y, waist


def backward(call: Call, waist: Tensor, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dx, ddown, ddown_bias, dup, dup_bias, dscale: those that `needs` names, None for the others."""
    x, atomic = call.x, not torch.are_deterministic_algorithms_enabled()
    plan, variants = _variants(_backward_kernel, *_what(call, dy.dtype), call.residual_is_x, atomic)
    rows, stride = rows_of(x, plan.first.size)
    rows_of_dy, dy_stride = rows_of(dy, plan.last.size)
    N = x.numel() // plan.first.size
    grads = dx, ddown, ddown_bias, dup, dup_bias, dscale = grads_like(call.differentiable, needs, N)
    if N == 0:
        return grads
    if call.adapter is not None:  # those of adapters without rows
        for grad in grads[1:]:
            if grad is not None:
                grad.zero_()
    if call.up is None:  # of one train, the output side stands where the second train's does
        dup, ddown_bias, dup_bias = ddown, None, ddown_bias
    blocks = plan.backward_of(N)
    programs, groups, pointers, of_groups = shares_of(call, plan, N, blocks, MAX_PROGRAMS if atomic else MAX_WORKSPACES)
    parts = plan.parts(N, blocks, plan.first, plan.last)
    parameters = _parameters(call)
    shared = {
        **{name: parameters[name] for name in ("down_ptr", "up_ptr", "up_bias_ptr", "learnt_scale_ptr")},
        "ddown_ptr": ddown,
        "ddown_bias_ptr": ddown_bias,
        "dup_ptr": dup,
        "dup_bias_ptr": dup_bias,
        "dscale_ptr": dscale,
        "grads_ptr": waist.new_zeros((groups if atomic else programs) * plan.grad_size),
        "scratch_ptr": waist.new_empty(groups * plan.scratch_size),
        "scale": call.scale,
    }
    args = {
        **shared,
        **parameters,
        "dy_ptr": rows_of_dy,
        "x_ptr": rows,
        "waist_ptr": waist,
        "dx_ptr": dx,
        "tables_ptr": waist.new_empty(programs * parts * plan.table_size),
        **pointers,
        "N": N,
        "stride_dyn": dy_stride,
        "stride_xn": stride,
    }
    launch.execute(Launch(variants(blocks, parts), (programs, parts), args))
    if not atomic and any(needs[1:]) and groups:
        sums = {
            **shared,
            "sums_ptr": waist.new_zeros(groups * plan.grad_size),
            "groups_ptr": of_groups,
            "programs": programs,
        }
        _, variants = _variants(_sum_kernel, *_what(call, dy.dtype))
        launch.execute(Launch(variants(blocks), (sum_blocks(plan.arrived), groups), sums))
    return grads


def _what(call: Call, y_dtype: torch.dtype) -> tuple[Any, ...]:
    """What the variants of a call's kernels depend on."""
    exact = torch.get_float32_matmul_precision() == "highest"
    where = architecture(call.x.device)
    return call.down_shape, call.up_shape, call.x.dtype, y_dtype, where, call.activation, call.dropout_p, exact


@cache
def _variants(
    kernel: Any,
    down_shape: TTShape,
    up_shape: TTShape | None,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    arch: str,
    activation: str,
    dropout_p: float,
    exact: bool,
    residual_is_x: bool = False,
    atomic: bool = True,
) -> tuple[Plan, Callable[..., Variant]]:
    """The plan, and the kernel's variants by the blocks and parts that a call is made with; for whole rows by None."""
    plan = plan_of(down_shape, up_shape, y_dtype.itemsize, arch)
    # The products with rows are in fp32 unless x and y share 16 bits.
    dtype = x_dtype if x_dtype is y_dtype else torch.float32
    constants = {
        **plan.named_sides,
        "TABLE_SIZE": plan.table_size,
        "GRAD_SIZE": plan.grad_size,
        "SCRATCH_SIZE": plan.scratch_size,
        "DSCALE": plan.dscale,
        "ARRIVED": plan.arrived,
        "BLOCK_B": plan.block_b,
        "ACTIVATION": activation,
        "DROPOUT_P": dropout_p,
        "DROPPED": threshold(dropout_p),
        "RESIDUAL_IS_X": residual_is_x,
        "ATOMIC": atomic,
        "DTYPE": DTYPES[dtype],
        "PRECISION": plan.precision(exact and dtype is torch.float32),
    }

    @cache
    def variant(blocks: Blocks | None, parts: int = 1) -> Variant:
        if blocks is None and plan.one_pass is not None:
            form, used = plan.one_pass, _one_pass_forward_kernel
            of_blocks = {
                **form.named_sides,
                "TABLE_SIZE": form.table_size,
                "LEVELS": form.levels,
                "BLOCK_N": form.n,
                "BLOCK_I": form.i,
                "BLOCK_O": form.o,
                "KEEPS_X": residual_is_x and form.same_matrix,
            }
            warps, stages = form.warps, form.stages
        else:
            assert blocks is not None
            used, of_blocks = kernel, {"BLOCK_N": blocks.n, "BLOCK_C": blocks.c, "PARTS": parts}
            warps, stages = blocks.warps, 1 if kernel is _sum_kernel else blocks.stages
        all_of_them = constants | of_blocks
        taken = {name: value for name, value in all_of_them.items() if name in used.arg_names}
        return Variant(used, taken, warps, stages)

    return plan, variant


def _parameters(call: Call) -> dict[str, Tensor | None]:
    """The pointers to parameters; of one train, its output side and its bias stand where the second train's do."""
    down, down_bias = call.down.contiguous(), contiguous(call.down_bias)
    up, up_bias = (down, down_bias) if call.up is None else (call.up.contiguous(), contiguous(call.up_bias))
    return {
        "down_ptr": down,
        "down_bias_ptr": None if call.up is None else down_bias,
        "up_ptr": up,
        "up_bias_ptr": up_bias,
        "learnt_scale_ptr": contiguous(call.learnt_scale),
        "seed_ptr": call.seed,
    }
