"""Gains and initial values of cores: how far one step of an optimiser moves a train, and from where.

Adam moves every parameter by about the learning rate. A train has few parameters, and the wider the layer, the less a
step changes its matrix; so a core G is stored divided by a gain c that depends on its size, its train's waist and the
layer's width, and one step moves G by c times the rate. With n numbers in the core, all other cores orthonormal about
it, and the waist K:

    a train from the layer's width to the waist     c = DOWN · sqrt(K / n)
    a train from the waist to the layer's width     c = UP · sqrt(K · width / n)

which moves the train as far as that rate moves the two factors of a LoRA, at every width (DESIGN.md has the argument
and the figures). The function depends only on the product of a side's gains: it is rounded to a power of two and stored
in the shape (`TTShape.gains`); the remainder is in the cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels.shape import TTShape

DOWN, UP = 16.0, 2.0


def with_gains(shape: TTShape, up: bool) -> TTShape:
    """The shape with the gains for learning rates that are usual for LoRA.

    Args:
        up: whether the train leads from the waist to the layer's width, as the second of an adapter does.
    """
    factors = core_gains(shape, up)
    sides = factors[: shape.cut], factors[shape.cut :]
    return TTShape(shape.in_modes, shape.out_modes, shape.ranks, [round(math.log2(math.prod(side))) for side in sides])


def core_gains(shape: TTShape, up: bool) -> list[float]:
    """The gain of each core."""
    scale = UP * math.sqrt(shape.waist * shape.out_features) if up else DOWN * math.sqrt(shape.waist)
    return [scale / math.sqrt(size) for size in shape.core_sizes]


@torch.no_grad()
def start_(cores: Tensor, shape: TTShape, up: bool, zero: bool) -> Tensor:
    """Fill the flat cores of a shape with gains: orthonormal about the cut, or about the core that is zero.

    Args:
        cores: `[shape.num_params]`, overwritten.
        up: as `with_gains`.
        zero: make W = 0, by zeros in the largest core, of several the one nearest the cut on the output side: the
            largest core sees most of the gradient.
    """
    if cores.is_meta:
        return cores
    centre = _largest(shape) if zero else shape.cut
    cores_list = []
    for k, (left, mode, right) in enumerate(shape.core_shapes):
        rows, columns = (left * mode, right) if k < centre else (left, mode * right)
        u, _, vh = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
        cores_list.append((u @ vh).reshape(-1))
    if zero:
        cores_list[centre].zero_()
    stored = [core / gain for core, gain in zip(cores_list, _stored_gains(shape, up), strict=True)]
    return cores.copy_(torch.cat(stored))


def _stored_gains(shape: TTShape, up: bool) -> list[float]:
    """The gains of the cores, each side's multiplied by what makes their product the shape's power of two."""
    gains, exact = core_gains(shape, up), []
    for side, factor in zip((gains[: shape.cut], gains[shape.cut :]), shape.factors, strict=True):
        rest = (factor / math.prod(side)) ** (1 / len(side))
        exact += [gain * rest for gain in side]
    return exact


def _largest(shape: TTShape) -> int:
    """The largest core, the first on the output side among equals."""
    sizes: Sequence[int] = shape.core_sizes
    places = [k for k, size in enumerate(sizes) if size == max(sizes)]
    return next((k for k in places if k >= shape.cut), places[0])
