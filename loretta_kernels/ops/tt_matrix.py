"""The matrix of a tensor train, for merging and export."""

from __future__ import annotations

import torch
from torch import Tensor

from loretta_kernels import reference
from loretta_kernels._autocast import off
from loretta_kernels.ops._arguments import check_cores
from loretta_kernels.shape import TTShape


def tt_matrix(cores: Tensor, shape: TTShape) -> Tensor:
    """The matrix `W [in_features, out_features]` that a tensor train stands for.

    Args:
        cores: `[shape.num_params]`, core after core, each row-major `[r, n, r']`; any floating-point dtype.
        shape: its modes and ranks.

    Returns:
        `[I, O]` in the dtype of the cores, computed in fp32 or better; differentiable.

    Raises:
        TypeError, ValueError: cores or shape of the wrong kind or size.

    Source: LoRETTA (NAACL 2024, arXiv 2402.11417), its tensor-train format.
    """
    check_cores("cores", cores, shape)
    wide = torch.promote_types(cores.dtype, torch.float32)
    with off(cores.device):
        return reference.tt_matrix(cores.to(wide), shape).to(cores.dtype)
