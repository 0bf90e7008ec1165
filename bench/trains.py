"""Matrices that are the same in whatever shape a tensor train has, so that implementations of other shapes compute the
same function at their own sizes and ranks.

A wave over the flat index, `W[f] = cos(omega · f + phi)`, turns by `omega · digit · stride` at each digit of f: a train
whose cores are 2 x 2 rotations, for any modes. A sum of waves is a train of blocks, and what is left of an odd rank is
the wave `(-1)^f`, of 1 x 1 blocks. No train of this rank is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def wave_cores(modes: Sequence[int], rank: int, scale: float, seed: int) -> list[Tensor]:
    """Cores `[r, n, r']` in fp64 of `scale · (sum of waves)`; about `rank / 2` waves, so many times scale² in variance.

    Args:
        modes: of the flat index, the slowest first, two or more. Other modes of the same product give the same entries.
        rank: of every inner bond.
        scale: of every wave.
        seed: of frequencies and phases.
    """
    generator = torch.Generator().manual_seed(seed)
    waves, left = divmod(rank, 2)
    omega, phi = (math.pi * torch.rand(2, waves, generator=generator, dtype=torch.float64)).unbind()
    cores = []
    for k, mode in enumerate(modes):
        stride = prod(modes[k + 1 :])
        steps = stride * torch.arange(mode, dtype=torch.float64)
        core = torch.zeros(rank, mode, rank, dtype=torch.float64)
        for j in range(waves):
            angle = omega[j] * steps + (phi[j] if k == 0 else 0)
            cos, sin = torch.cos(angle), torch.sin(angle)
            core[2 * j, :, 2 * j], core[2 * j, :, 2 * j + 1] = cos, sin
            core[2 * j + 1, :, 2 * j], core[2 * j + 1, :, 2 * j + 1] = -sin, cos
        if left:
            core[-1, :, -1] = 1 - 2 * (steps % 2)
        cores.append(core)
    # An end of the train picks the cosines: with [1, 0] on the left, (1, 0) · R(angle) = (cos, sin).
    pick = torch.zeros(rank, dtype=torch.float64)
    pick[0:rank:2] = 1
    cores[0] = scale * torch.einsum("a,anb->nb", pick, cores[0])[None]
    cores[-1] = torch.einsum("anb,b->an", cores[-1], pick)[..., None]
    return balanced(cores)


def balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same train with cores of equal norm."""
    norms = [core.norm() for core in cores]
    mean = prod(norm.item() for norm in norms) ** (1 / len(cores))
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def flat(cores: Sequence[Tensor]) -> Tensor:
    """The cores in fp32 as the one tensor that our operators take."""
    return torch.cat([core.reshape(-1) for core in cores]).float()
