"""y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up): operator, gradient, public function."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loretta_kernels._autocast import cast
from loretta_kernels._dispatch import choose
from loretta_kernels.ops._arguments import check_cores, check_vector, check_x, seed_tensor
from loretta_kernels.ops._operator import keep_needed, like_needed, operator
from loretta_kernels.reference import ACTIVATIONS
from loretta_kernels.shape import TTShape


def tt_adapter(
    x: Tensor,
    down: Tensor,
    down_shape: TTShape,
    down_bias: Tensor | None,
    up: Tensor,
    up_shape: TTShape,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up), both matrices tensor trains.

    Args:
        x: `[..., I]`, fp64, fp32, bf16 or fp16, any strides, any number of rows (none included).
        down, up: the flat cores, `[down_shape.num_params]` and `[up_shape.num_params]`; fp32, or x's dtype.
        down_shape, up_shape: modes and ranks for `I x B` and `B x O`.
        down_bias, up_bias: `[B]` and `[O]`, or None.
        activation: relu, gelu, gelu_tanh, silu, tanh or identity.
        scale: a number, or a one-element tensor, which can be learnt.
        residual: None for 0, x itself, or another tensor `[..., O]`.
        dropout_p: the probability, in [0, 1), that an element of x is dropped on its way down (not in the residual).
        seed: which elements: an int or a one-element int64 tensor; None draws one from torch's RNG, so that
            `torch.manual_seed` and checkpointing reproduce a run. Backward draws the mask again, it is not stored.

    Returns:
        `[..., O]` in the dtype to which x and residual promote. Under autocast x is cast to autocast's dtype first, as
        `nn.Linear` does, and with it a residual that is x; another residual keeps its dtype and so its precision. Sums
        are in fp32 (fp64 for fp64). Backward keeps x and `[N, waist]`; it is differentiable once.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.
        RuntimeError: the backend asked for cannot serve.

    Source: LoRETTA_adp (NAACL 2024, arXiv 2402.11417), the tensorised adapter.
    """
    check_cores("down", down, down_shape)
    check_cores("up", up, up_shape)
    check_vector("down_bias", down_bias, down_shape.out_features)
    check_vector("up_bias", up_bias, up_shape.out_features)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return adapter(x, down, down_shape, down_bias, up, up_shape, up_bias, activation, scale, residual, dropout_p, seed)


def adapter(
    x: Tensor,
    down: Tensor,
    down_shape: TTShape,
    down_bias: Tensor | None,
    up: Tensor,
    up_shape: TTShape,
    up_bias: Tensor | None,
    activation: str,
    scale: float | Tensor,
    residual: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
) -> Tensor:
    """What `tt_adapter` and `tt_lora` share: the checks of their common arguments and the operator."""
    check_x(x, down_shape)
    if down_shape.out_features != up_shape.in_features:
        raise ValueError(
            f"the first train gives {down_shape.out_features} features, the second takes {up_shape.in_features}"
        )
    if residual is not None and residual.shape != (*x.shape[:-1], up_shape.out_features):
        raise ValueError(
            f"residual must be {[*x.shape[:-1], up_shape.out_features]}, as the output is, got {list(residual.shape)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    learnt_scale = scale.to(x.device) if isinstance(scale, Tensor) else None
    if learnt_scale is not None and learnt_scale.numel() != 1:
        raise ValueError(f"scale must be a number or a one-element tensor, got {list(learnt_scale.shape)}")
    residual_is_x = residual is x
    x, other_residual = cast(x), None if residual_is_x else residual
    backend = choose(x, down, down_bias, up, up_bias, learnt_scale, other_residual)
    y: Tensor = _TTAdapter.apply(
        x,
        down,
        down_bias,
        up,
        up_bias,
        learnt_scale,
        other_residual,
        seed_tensor(seed, x.device if backend == "triton" else torch.device("cpu")) if dropout_p else None,
        down_shape,
        up_shape,
        (residual_is_x, 1.0 if isinstance(scale, Tensor) else float(scale), activation, float(dropout_p)),
        backend,
    )
    return y


def _fwd_fake(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    down_shape, up_shape = TTShape.from_spec(tuple(down_spec)), TTShape.from_spec(tuple(up_spec))
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    waist_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = x.new_empty(*x.shape[:-1], up_shape.out_features, dtype=dtype)
    return y, x.new_empty(prod(x.shape[:-1]), down_shape.waist, dtype=waist_dtype)


def _bwd_fake(
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
    backend: str,
) -> tuple[Tensor, ...]:
    return like_needed((x, down, down_bias, up, up_bias, learnt_scale), needs)


_TRAINS = "Tensor down, int[] down_spec, Tensor? down_bias, Tensor up, int[] up_spec, Tensor? up_bias"
_fwd = operator(
    f"tt_adapter_fwd(Tensor x, {_TRAINS}, Tensor? learnt_scale, Tensor? residual, Tensor? seed, bool residual_is_x, "
    "float scale, str activation, float dropout_p, str backend) -> (Tensor y, Tensor waist)",
    _fwd_fake,
)
_bwd = operator(
    f"tt_adapter_bwd(Tensor dy, Tensor x, Tensor waist, {_TRAINS}, Tensor? learnt_scale, Tensor? seed, "
    "bool residual_is_x, float scale, str activation, float dropout_p, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor ddown, Tensor ddown_bias, Tensor dup, Tensor dup_bias, Tensor dscale)",
    _bwd_fake,
)


class _TTAdapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        learnt_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        down_shape: TTShape,
        up_shape: TTShape,
        options: tuple[bool, float, str, float],
        backend: str,
    ) -> Tensor:
        trains = down, down_shape.spec, down_bias, up, up_shape.spec, up_bias
        y, waist = _fwd(x, *trains, learnt_scale, residual, seed, *options, backend)
        ctx.save_for_backward(x, waist, down, down_bias, up, up_bias, learnt_scale, seed)
        ctx.specs, ctx.options, ctx.backend = (down_shape.spec, up_shape.spec), options, backend
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, waist, down, down_bias, up, up_bias, learnt_scale, seed = ctx.saved_tensors
        down_spec, up_spec = ctx.specs
        trains = down, down_spec, down_bias, up, up_spec, up_bias
        needs, grads = ctx.needs_input_grad[:6], [None] * 6
        if any(needs):
            grads = _bwd(dy, x, waist, *trains, learnt_scale, seed, *ctx.options, needs, ctx.backend)
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[6] else None
        return *keep_needed(grads, needs), dresidual, None, None, None, None, None
