"""TT-SVD: a matrix as a tensor train, exactly or approximately."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def tt_svd(
    matrix: Tensor, in_modes: Iterable[int], out_modes: Iterable[int], max_rank: int | None = None
) -> list[Tensor]:
    """The cores of a train that equals a matrix, or approximates it.

    Args:
        matrix: `[I, O]`, any dtype; computed in fp64.
        in_modes, out_modes: whose products are I and O.
        max_rank: no bond has more; None is exact.

    Returns:
        Cores `[r, n, r']` in fp64. The error is at most `sqrt(bonds)` times the least possible at those ranks.

    Raises:
        RuntimeError: the modes are not those of the matrix.

    Example:
        >>> cores = tt_svd(torch.randn(64, 16), (8, 8), (4, 4), max_rank=8)
        >>> [tuple(core.shape) for core in cores]
        [(1, 8, 8), (8, 8, 8), (8, 4, 4), (4, 4, 1)]

    Source: Oseledets, Tensor-Train Decomposition (SIAM J. Sci. Comput. 33, 2011), algorithm 1.
    """
    return split_core(matrix.double().reshape(1, -1, 1), (*in_modes, *out_modes), max_rank)


def split_core(core: Tensor, modes: Sequence[int], max_rank: int | None = None) -> list[Tensor]:
    """A core `[r, prod(modes), r']` as one core per mode, of equal norms, by an SVD per bond."""
    cores, rest = [], core
    for mode in modes[:-1]:
        rank, _, last = rest.shape
        u, s, vh = torch.linalg.svd(rest.reshape(rank * mode, -1), full_matrices=False)
        keep = min(len(s), max_rank or len(s))
        cores.append(u[:, :keep].reshape(rank, mode, keep))
        rest = (s[:keep, None] * vh[:keep]).reshape(keep, -1, last)
    cores.append(rest)
    norms = torch.stack([core.norm() for core in cores])
    if (norms == 0).any():
        return cores
    shared = norms.log().mean().exp()
    return [core * (shared / norm) for core, norm in zip(cores, norms, strict=True)]


def flat(cores: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The cores as the one flat tensor that the operators take."""
    return torch.cat([core.to(dtype).reshape(-1) for core in cores])
