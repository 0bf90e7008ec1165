"""Tensor-train operators for fine-tuning: tensors in, tensors out."""

from loretta_kernels import reference
from loretta_kernels._dispatch import backend
from loretta_kernels._torch.contraction import frozen
from loretta_kernels.explain import explain
from loretta_kernels.functions import tt_adapter, tt_linear, tt_lora, tt_matrix
from loretta_kernels.groups import Groups
from loretta_kernels.shape import TTShape
from loretta_kernels.train import TT

ACTIVATIONS = tuple(reference.ACTIVATIONS)

__all__ = [
    "ACTIVATIONS",
    "TT",
    "Groups",
    "TTShape",
    "backend",
    "explain",
    "frozen",
    "reference",
    "tt_adapter",
    "tt_linear",
    "tt_lora",
    "tt_matrix",
]
