"""The operators in PyTorch: the sides contracted by small matmuls, skinny products with x, an analytic backward."""

from loretta_kernels._torch.tt_adapter import tt_adapter_bwd, tt_adapter_fwd
from loretta_kernels._torch.tt_linear import tt_linear_bwd, tt_linear_fwd

__all__ = ["tt_adapter_bwd", "tt_adapter_fwd", "tt_linear_bwd", "tt_linear_fwd"]
