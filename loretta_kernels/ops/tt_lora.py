"""y = residual + scale · drop(x) · A · B for tensor trains A and B: the public function.

It is the adapter's operator with the identity for an activation and no biases: one operator forward, one backward.
"""

from __future__ import annotations

from torch import Tensor

from loretta_kernels.ops._arguments import check_cores
from loretta_kernels.ops.tt_adapter import adapter
from loretta_kernels.shape import TTShape


def tt_lora(
    x: Tensor,
    a: Tensor,
    a_shape: TTShape,
    b: Tensor,
    b_shape: TTShape,
    *,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = residual + scale · drop(x) · A · B, both matrices tensor trains.

    Args:
        x: `[..., I]`, fp64, fp32, bf16 or fp16, any strides, any number of rows (none included).
        a, b: the flat cores, `[a_shape.num_params]` and `[b_shape.num_params]`; fp32, or x's dtype.
        a_shape, b_shape: modes and ranks for `I x r` and `r x O`.
        scale: LoRA's alpha / r: a number, or a one-element tensor, which can be learnt.
        residual: the frozen layer's output, `[..., O]`; None for 0; or x itself.
        dropout_p, seed: as `tt_adapter`.

    Returns:
        `[..., O]`, with dtype, autocast, precision and what is kept for backward as `tt_adapter`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.
        RuntimeError: the backend asked for cannot serve.

    Source: LoRETTA_rep (NAACL 2024, arXiv 2402.11417), the reparameterised update.
    """
    check_cores("a", a, a_shape)
    check_cores("b", b, b_shape)
    return adapter(x, a, a_shape, None, b, b_shape, None, "identity", scale, residual, dropout_p, seed)
