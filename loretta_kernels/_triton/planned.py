"""The launches that a call would make, with tensors of meta for its operands: nothing is allocated and nothing runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels._triton import launch
from loretta_kernels._triton.adapter import backward, forward
from loretta_kernels._triton.launch import Launch
from loretta_kernels._triton.operands import planning_for
from loretta_kernels.call import Call
from loretta_kernels.shape import TTShape


def planned(
    operator: str,
    shapes: Sequence[TTShape],
    dtype: torch.dtype = torch.bfloat16,
    N: int = 8192,
    *,
    arch: str = "sm_90",
    activation: str = "relu",
    dropout_p: float = 0.0,
    core_dtype: torch.dtype = torch.float32,
    adapters: int = 0,
) -> list[Launch]:
    """The launches of a training step, forward then backward, as its layer calls the operator.

    Compile one where there is no such GPU, in a process without TRITON_INTERPRET:

        source = triton.compiler.ASTSource(**record.source())
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=record.options())

    Args:
        operator: "tt_adapter" (residual x, biases), "tt_lora" (another residual, no biases) or "tt_linear" (bias).
        shapes: its one or two trains.
        dtype, core_dtype: those of the rows and of the parameters.
        N: rows.
        arch: the architecture to plan for.
        activation, dropout_p: as `tt_adapter`; tt_lora has the identity.
        adapters: so many are stacked, and the rows use them in turn.
    """

    def new(*size: int, dtype: torch.dtype = core_dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def parameter(size: int) -> Tensor:
        return new(adapters, size) if adapters else new(size)

    first, last = shapes[0], shapes[-1]
    x, dy = new(N, first.in_features, dtype=dtype), new(N, last.out_features, dtype=dtype)
    adapts, two = operator == "tt_adapter", operator != "tt_linear"
    call = Call(
        x,
        parameter(first.num_params),
        None if operator == "tt_lora" else parameter(first.out_features),
        parameter(last.num_params) if two else None,
        parameter(last.out_features) if adapts else None,
        learnt_scale=None,
        seed=new(1, dtype=torch.int64) if dropout_p else None,
        residual=dy if operator == "tt_lora" else None,
        adapter=torch.arange(N) % adapters if adapters else None,
        down_shape=first,
        up_shape=last if two else None,
        residual_is_x=adapts,
        activation=activation if adapts else "identity",
        dropout_p=dropout_p,
    )
    needs = tuple(t is not None for t in call.differentiable)
    with planning_for(arch), launch.recorded() as launches:
        forward(call)
        backward(call, new(N, first.waist, dtype=torch.float32), dy, needs)
    return launches
