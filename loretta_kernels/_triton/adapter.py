"""The launches of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from loretta_kernels._triton import launch
from loretta_kernels._triton._common import INTERPRETED
from loretta_kernels._triton.backward_kernel import _backward_kernel, _sum_kernel
from loretta_kernels._triton.core_grads import sum_blocks
from loretta_kernels._triton.forward_kernel import _forward_kernel
from loretta_kernels._triton.launch import Launch, Variant
from loretta_kernels._triton.one_pass_backward import _one_pass_backward_kernel
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
from loretta_kernels._triton.plan import MAX_PROGRAMS, MAX_WORKSPACES, Blocks, OnePass, plan_of
from loretta_kernels.call import Call
from loretta_kernels.philox import threshold
from loretta_kernels.shape import TTShape

NEAR = 2**28  # elements from row to row


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and the waist `[N, K]`."""
    x, kernels = call.x, _kernels_of(call, call.y_dtype)
    plan = kernels.plan
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
    count = multiprocessors(x.device)
    form = plan.one_pass_of(N, count) if call.adapter is None else None
    if form is not None:
        variant, grid = kernels.one_pass(form), (form.programs(N, count),)
        tables = prod(grid) * form.table_size
        if variant.constants["KEEPS_X"]:
            base = None
    else:
        blocks = plan.forward_of(largest_group(call, N))
        programs, _, pointers, _ = shares_of(call, plan, N, blocks, MAX_PROGRAMS)
        variant, grid = kernels.streamed(_forward_kernel, blocks), (programs, plan.parts(N, blocks, plan.last))
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
    kernels = _kernels_of(call, dy.dtype, atomic)
    plan = kernels.plan
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
    parameters = _parameters(call)
    gradients = {
        "ddown_ptr": ddown,
        "ddown_bias_ptr": ddown_bias,
        "dup_ptr": dup,
        "dup_bias_ptr": dup_bias,
        "dscale_ptr": dscale,
        "scale": call.scale,
    }
    of_rows = {
        **parameters,
        "dy_ptr": rows_of_dy,
        "x_ptr": rows,
        "waist_ptr": waist,
        "dx_ptr": dx,
        "N": N,
        "stride_dyn": dy_stride,
        "stride_xn": stride,
    }
    near = max(stride, dy_stride) < NEAR  # a block's rows are addressed from its first one in 32 bits
    if kernels.one_pass_backward is not None and call.adapter is None and dscale is None and near:
        form, variant = kernels.one_pass_backward
        programs = form.programs(N, multiprocessors(x.device))
        memory = {
            "tables_ptr": waist.new_empty(programs * (form.kept.tables + form.kept.end)),
            "grads_ptr": waist.new_zeros(form.grad_size),
            "scratch_ptr": waist.new_empty(form.scratch_size),
        }
        args = {**of_rows, **gradients, **memory}
        launch.execute(Launch(variant, (programs,), {name: args[name] for name in variant.names}))
        return grads
    blocks = plan.backward_of(N)
    programs, groups, pointers, of_groups = shares_of(call, plan, N, blocks, MAX_PROGRAMS if atomic else MAX_WORKSPACES)
    parts = plan.parts(N, blocks, plan.first, plan.last)
    shared = {
        **{name: parameters[name] for name in ("down_ptr", "up_ptr", "up_bias_ptr", "learnt_scale_ptr")},
        **gradients,
        "grads_ptr": waist.new_zeros((groups if atomic else programs) * plan.grad_size),
        "scratch_ptr": waist.new_empty(groups * plan.scratch_size),
    }
    args = {
        **of_rows,
        **shared,
        "tables_ptr": waist.new_empty(programs * parts * plan.table_size),
        **pointers,
    }
    launch.execute(Launch(kernels.streamed(_backward_kernel, blocks, parts), (programs, parts), args))
    if not atomic and any(needs[1:]) and groups:
        sums = {
            **shared,
            "sums_ptr": waist.new_zeros(groups * plan.grad_size),
            "groups_ptr": of_groups,
            "programs": programs,
        }
        launch.execute(Launch(kernels.streamed(_sum_kernel, blocks), (sum_blocks(plan.arrived), groups), sums))
    return grads


class _Kernels:
    """The plan of calls of one kind, and the variants of the kernels that serve them, each made when first used.

    The arguments are all that the kernels' constants depend on, but for the blocks and the parts.
    """

    def __init__(
        self,
        down_shape: TTShape,
        up_shape: TTShape | None,
        x_dtype: torch.dtype,
        y_dtype: torch.dtype,
        arch: str,
        activation: str,
        dropout_p: float,
        residual_is_x: bool,
        exact: bool,
        atomic: bool,
    ) -> None:
        plan = plan_of(down_shape, up_shape, y_dtype.itemsize, arch, residual_is_x, dropout_p > 0)
        self.plan = plan = plan.streamed if INTERPRETED.value else plan  # Triton's interpreter runs no other form
        # The products with rows are in fp32 unless x and y share 16 bits.
        dtype = x_dtype if x_dtype is y_dtype else torch.float32
        self._variants: dict[tuple[Any, ...], Variant] = {}
        self._constants = {
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

    def streamed(self, kernel: Any, blocks: Blocks, parts: int = 1) -> Variant:
        """A kernel that walks over the features of a row."""
        key = kernel.__name__, blocks, parts
        if key not in self._variants:
            of_blocks = {"BLOCK_N": blocks.n, "BLOCK_C": blocks.c, "PARTS": parts}
            stages = 1 if kernel is _sum_kernel else blocks.stages
            self._variants[key] = self._variant(kernel, of_blocks, blocks.warps, stages)
        return self._variants[key]

    def one_pass(self, form: OnePass) -> Variant:
        """The forward that keeps whole rows on the chip, in a form of the plan."""
        key = "one_pass", form.n
        if key not in self._variants:
            own = {"TABLE_SIZE": form.table_size, "KEEPS_X": self._constants["RESIDUAL_IS_X"] and form.same_matrix}
            self._variants[key] = self._of_whole_rows(_one_pass_forward_kernel, form, own)
        return self._variants[key]

    @cached_property
    def one_pass_backward(self) -> tuple[OnePass, Variant] | None:
        """The backward that keeps whole rows on the chip, where the plan has it and programs may add in any order."""
        form = self.plan.one_pass_backward
        if form is None or not self._constants["ATOMIC"]:
            return None
        own = {
            "AT": form.kept,
            "TABLE_SIZE": form.kept.tables + form.kept.end,
            "KEEPS_DY": self._constants["RESIDUAL_IS_X"] and form.same_matrix,
            "FLAT": form.resident > 1,
        }
        return form, self._of_whole_rows(_one_pass_backward_kernel, form, own)

    def _of_whole_rows(self, kernel: Any, form: OnePass, own: dict[str, Any]) -> Variant:
        """A kernel that keeps whole rows on the chip."""
        blocks = {"BLOCK_N": form.n, "BLOCK_I": form.i, "BLOCK_O": form.o}
        constants = {**form.named_sides, "LEVELS": form.levels, **blocks, **own}
        return self._variant(kernel, constants, form.warps, form.stages)

    def _variant(self, kernel: Any, own: dict[str, Any], warps: int, stages: int) -> Variant:
        """With those of all constants that the kernel takes."""
        constants = {name: value for name, value in (self._constants | own).items() if name in kernel.arg_names}
        return Variant(kernel, constants, warps, stages)


_kernels = cache(_Kernels)


def _kernels_of(call: Call, y_dtype: torch.dtype, atomic: bool = True) -> _Kernels:
    """What serves a call."""
    return _kernels(
        call.down_shape,
        call.up_shape,
        call.x.dtype,
        y_dtype,
        architecture(call.x.device),
        call.activation,
        call.dropout_p,
        call.residual_is_x,
        torch.get_float32_matmul_precision() == "highest",
        atomic,
    )


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
