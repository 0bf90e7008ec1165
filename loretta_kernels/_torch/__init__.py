"""The operator in PyTorch: the sides contracted by small matmuls, skinny products with x, an analytic backward."""

from loretta_kernels._torch.adapter import backward, forward
from loretta_kernels._torch.inference import infer

__all__ = ["backward", "forward", "infer"]
