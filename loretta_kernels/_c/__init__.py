"""The operators in C: one call forward and one backward, each a single pass over the rows."""

from loretta_kernels._c.operators import tt_adapter_bwd, tt_adapter_fwd, tt_linear_bwd, tt_linear_fwd

__all__ = ["tt_adapter_bwd", "tt_adapter_fwd", "tt_linear_bwd", "tt_linear_fwd"]
