"""The launches that a call would make, with tensors of meta for its operands: nothing is allocated and nothing runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels._triton import launch
from loretta_kernels._triton.launch import Launch
from loretta_kernels._triton.operands import planning_for
from loretta_kernels._triton.tt_adapter import tt_adapter_bwd, tt_adapter_fwd
from loretta_kernels._triton.tt_linear import tt_linear_bwd, tt_linear_fwd
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
    """

    def new(*size: int, dtype: torch.dtype = core_dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    first, last = shapes[0], shapes[-1]
    x, dy = new(N, first.in_features, dtype=dtype), new(N, last.out_features, dtype=dtype)
    waist = new(N, first.waist, dtype=torch.float32)
    with planning_for(arch), launch.recorded() as launches:
        if operator == "tt_linear":
            train = new(first.num_params), first.spec, new(first.out_features)
            tt_linear_fwd(x, *train)
            tt_linear_bwd(dy, x, waist, *train, (True,) * 3)
            return launches
        adapts = operator == "tt_adapter"
        down = new(first.num_params), first.spec, new(first.out_features) if adapts else None
        up = new(last.num_params), last.spec, new(last.out_features) if adapts else None
        seed = new(1, dtype=torch.int64) if dropout_p else None
        act = activation if adapts else "identity"
        needs = True, True, adapts, True, adapts, False
        tt_adapter_fwd(x, *down, *up, None, None if adapts else dy, seed, adapts, 1.0, act, dropout_p)
        tt_adapter_bwd(dy, x, waist, *down, *up, None, seed, adapts, 1.0, act, dropout_p, needs)
    return launches
