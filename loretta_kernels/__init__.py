"""Tensor-train operators for fine-tuning: tensors in, tensors out."""

from loretta_kernels import reference
from loretta_kernels._dispatch import backend
from loretta_kernels.explain import explain
from loretta_kernels.ops.tt_adapter import tt_adapter
from loretta_kernels.ops.tt_linear import tt_linear
from loretta_kernels.ops.tt_lora import tt_lora
from loretta_kernels.ops.tt_matrix import tt_matrix
from loretta_kernels.shape import TTShape

ACTIVATIONS = tuple(reference.ACTIVATIONS)

__all__ = [
    "ACTIVATIONS",
    "TTShape",
    "backend",
    "explain",
    "reference",
    "tt_adapter",
    "tt_linear",
    "tt_lora",
    "tt_matrix",
]
