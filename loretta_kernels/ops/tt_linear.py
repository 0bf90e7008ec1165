"""y = x · W + b for a tensor train W: the operator, its gradient, the public function."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loretta_kernels._autocast import cast
from loretta_kernels._dispatch import choose
from loretta_kernels.ops._arguments import check_cores, check_vector, check_x
from loretta_kernels.ops._operator import keep_needed, like_needed, operator
from loretta_kernels.shape import TTShape


def tt_linear(x: Tensor, cores: Tensor, shape: TTShape, bias: Tensor | None = None) -> Tensor:
    """y = x · W + b, through the waist of the train: W is never formed.

    Args:
        x: `[..., shape.in_features]`, fp64, fp32, bf16 or fp16, any strides, any number of rows (none included).
        cores: `[shape.num_params]`, core after core, each row-major `[r, n, r']`; fp32, or x's dtype.
        shape: modes and ranks.
        bias: `[shape.out_features]` or None.

    Returns:
        `[..., shape.out_features]` in x's dtype; under autocast in autocast's, to which x is cast. Sums are in fp32
        (fp64 for fp64). Backward keeps x and `[N, waist]`; it is differentiable once.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.
        RuntimeError: the backend asked for cannot serve.

    Source: LoRETTA (NAACL 2024, arXiv 2402.11417) tensorises layers, the classifier among them, this way.
    """
    check_cores("cores", cores, shape)
    check_x(x, shape)
    check_vector("bias", bias, shape.out_features)
    x = cast(x)
    y: Tensor = _TTLinear.apply(x, cores, bias, shape, choose(x, cores, bias))
    return y


def _fwd_fake(
    x: Tensor, cores: Tensor, spec: Sequence[int], bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    shape = TTShape.from_spec(tuple(spec))
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = x.new_empty(*x.shape[:-1], shape.out_features)
    return y, x.new_empty(prod(x.shape[:-1]), shape.waist, dtype=dtype)


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    waist: Tensor,
    cores: Tensor,
    spec: Sequence[int],
    bias: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return like_needed((x, cores, bias), needs)


_fwd = operator(
    "tt_linear_fwd(Tensor x, Tensor cores, int[] spec, Tensor? bias, str backend) -> (Tensor y, Tensor waist)",
    _fwd_fake,
)
_bwd = operator(
    "tt_linear_bwd(Tensor dy, Tensor x, Tensor waist, Tensor cores, int[] spec, Tensor? bias, bool[] needs, "
    "str backend) -> (Tensor dx, Tensor dcores, Tensor dbias)",
    _bwd_fake,
)


class _TTLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cores: Tensor, bias: Tensor | None, shape: TTShape, backend: str) -> Tensor:
        y, waist = _fwd(x, cores, shape.spec, bias, backend)
        ctx.save_for_backward(x, waist, cores, bias)
        ctx.spec, ctx.backend = shape.spec, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, waist, cores, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = _bwd(dy, x, waist, cores, ctx.spec, bias, needs, ctx.backend)
        return *keep_needed(grads, needs), None, None
