"""The operator in PyTorch: the sides contracted by small matmuls, skinny products with x, an analytic backward."""

from loretta_kernels._torch.adapter import backward, forward

__all__ = ["backward", "forward"]
