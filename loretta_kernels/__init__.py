"""Tensor-train operators for fine-tuning: tensors in, tensors out."""

from loretta_kernels.shape import TTShape

__all__ = ["TTShape"]
