"""The one operator: its registration with torch, its gradient, and which of its forms serves a call.

A call on plain tensors, outside of torch.compile and dispatch modes, runs the backend directly. Under these, and for
meta tensors and subclasses, it goes through the registered operators. Under function transforms, forward-mode
differentiation, torch.jit.trace and the ONNX exporter the definition is computed, in torch's own operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from loretta_kernels import _dispatch, reference
from loretta_kernels._torch.inference import infer_cached
from loretta_kernels.call import Call
from loretta_kernels.philox import dropout_factor
from loretta_kernels.shape import TTShape
from loretta_kernels.train import TT

_TENSORS = (
    "Tensor x, Tensor down, Tensor? down_bias, Tensor? up, Tensor? up_bias, Tensor? learnt_scale, Tensor? seed, "
    "Tensor? residual, Tensor? adapter"
)
_CONSTANTS = "int[] down_spec, int[] up_spec, bool residual_is_x, float scale, str activation, float dropout_p"
_library = torch.library.Library("loretta", "DEF")


def _called(args: Sequence[Any]) -> Call:
    """The call that an operator's arguments stand for."""
    tensors, (down_spec, up_spec), options = args[:9], args[9:11], args[11:]
    up_shape = TTShape.from_spec(tuple(up_spec)) if up_spec else None
    return Call._make((*tensors, TTShape.from_spec(tuple(down_spec)), up_shape, *options))


def _arguments(call: Call) -> tuple[Any, ...]:
    """The operator's arguments for a call."""
    up_spec = call.up_shape.spec if call.up_shape else ()
    return *call.tensors, call.down_shape.spec, up_spec, *call[11:]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _dispatch.forward(_called(args))


def _backward(waist: Tensor, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As the backend's, with an empty tensor in place of None: a schema's results are tensors."""
    grads = _dispatch.backward(_called(args[:-1]), waist, dy, tuple(args[-1]))
    return tuple(waist.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = _called(args)
    lead = call.x.shape[:-1]
    y = call.x.new_empty(*lead, call.out_features, dtype=call.y_dtype)
    return y, call.x.new_empty(prod(lead), call.down_shape.waist, dtype=call.sum_dtype)


def _backward_fake(waist: Tensor, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if t is not None and need else waist.new_empty(0)
        for t, need in zip(_called(args[:-1]).differentiable, args[-1], strict=True)
    )


_library.define(
    f"adapter_forward({_TENSORS}, {_CONSTANTS}) -> (Tensor y, Tensor waist)", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    f"adapter_backward(Tensor waist, Tensor dy, {_TENSORS}, {_CONSTANTS}, bool[] needs) -> "
    "(Tensor dx, Tensor ddown, Tensor ddown_bias, Tensor dup, Tensor dup_bias, Tensor dlearnt_scale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _run, _fake in (
    ("adapter_forward", _forward, _forward_fake),
    ("adapter_backward", _backward, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"loretta::{_name}", _fake, lib=_library)


def apply(call: Call) -> Tensor:
    """y of a call with checked arguments."""
    y: Tensor
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            return definition(call)
        y = _Adapter.apply(*call)
        return y
    if _is_transformed():
        return definition(call)
    if not torch.is_grad_enabled() and _is_plain(call.tensors):
        return _dispatch.infer(call)
    y = _apply_untransformed(*call)
    return y


def apply_cached(x: Any, down: Any, up: Any, activation: str, scale: Any, residual: Any) -> Tensor | None:
    """y, for a call without gradients whose checked arguments PyTorch's path has cached; otherwise None."""
    if _dispatch.forced() not in ("auto", "torch") or _is_transformed() or torch.is_autocast_enabled("cpu"):
        return None
    return infer_cached(x, down, up, activation, scale, residual, _is_plain)


def definition(call: Call) -> Tensor:
    """y by the definition, in torch's own operators: differentiable any number of times and in any way."""
    dtype = call.sum_dtype
    x, residual = call.x.to(dtype), call.x if call.residual_is_x else call.residual
    mask = None
    if call.seed is not None:
        rows = prod(x.shape[:-1])
        mask = dropout_factor(call.seed, 0, rows, x.shape[-1], call.dropout_p, dtype).view(x.shape)
    size = () if call.adapter is None else (-1,)
    scale = call.scale if call.learnt_scale is None else call.scale * call.learnt_scale.to(dtype).reshape(size)
    down, index = TT(call.down, call.down_shape, call.down_bias), call.adapter
    if call.up is None or call.up_shape is None:
        y = reference.tt_linear(x, down, index=index)
    else:
        up = TT(call.up, call.up_shape, call.up_bias)
        y = reference.tt_adapter(x, down, up, activation=call.activation, scale=scale, mask=mask, index=index)
    return (y if residual is None else residual + y).to(call.y_dtype)


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        call = Call._make(args)
        plain = not torch.compiler.is_compiling() and _is_plain(call.tensors)
        y, waist = _dispatch.forward(call) if plain else torch.ops.loretta.adapter_forward.default(*_arguments(call))
        ctx.save_for_backward(waist, *call.tensors[:7], call.adapter)
        ctx.constants, ctx.backend = call[9:], _dispatch.forced()
        ctx.residual_dtype = None if call.residual is None else call.residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        waist, *tensors, index = ctx.saved_tensors
        call = Call._make((*tensors, None, index, *ctx.constants))
        needs = ctx.needs_input_grad[:6]
        grads: Sequence[Tensor | None] = (None,) * 6
        if any(needs):
            if torch.compiler.is_compiling():
                grads = torch.ops.loretta.adapter_backward.default(waist, dy, *_arguments(call), needs)
            elif torch.is_grad_enabled():
                grads = _differentiable_grads(call, dy, needs)
            else:
                with _dispatch.backend(ctx.backend):
                    grads = _grads(call, waist, dy, needs)
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[7] else None
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *wanted, None, dresidual, None, None, None, None, None, None, None


# Without what torch does first in Python for function transforms, which `apply` has ruled out.
_apply_untransformed = super(torch.autograd.Function, _Adapter).apply


def _grads(call: Call, waist: Tensor, dy: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    if dy.device != call.x.device:
        raise RuntimeError(f"the gradient of y must be on {call.x.device}, as x is, got {dy.device}")
    if _is_plain((*call.tensors, waist, dy)):
        return _dispatch.backward(call, waist, dy, needs)
    grads: tuple[Tensor, ...] = torch.ops.loretta.adapter_backward.default(waist, dy, *_arguments(call), needs)
    return grads


def _differentiable_grads(call: Call, dy: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as functions of the operands and of dy, for a backward of the backward."""
    wanted = [t for t, need in zip(call.differentiable, needs, strict=True) if t is not None and need]
    # The residual only adds; its gradient is dy. So it is left out, but where it is x.
    found = iter(torch.autograd.grad(definition(call), wanted, dy.to(call.y_dtype), create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def _is_transformed() -> bool:
    """Whether a torch.func transform, forward-mode differentiation or torch.jit.trace is active."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether no dispatch mode is on and no tensor is a subclass, lazily negated or conjugated."""
    if is_in_torch_dispatch_mode():
        return False
    plain: frozenset[int] | None = None
    for t in tensors:  # no generator: that would take as long as all it does
        if t is not None:
            if plain is None:
                plain = _plain_keys(t.device.type)
            if torch._C._dispatch_keys(t).raw_repr() not in plain:
                return False
    return True


@cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """The dispatch keys of a plain tensor on such a device, and those of one made in inference mode."""
    if device_type == "meta":
        return frozenset()
    with torch.inference_mode():
        inference = torch.empty(0, device=device_type)
    return frozenset(torch._C._dispatch_keys(t).raw_repr() for t in (torch.empty(0, device=device_type), inference))
