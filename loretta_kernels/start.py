"""Where training starts, and how far one step goes: the gains of a train and its first cores.

Adam moves every stored number by about the rate. A train has few numbers, and the wider the layer, the less each of
them moves it; so a core G is stored divided by a gain c that depends on its size, its train's waist and the layer's
width, and one step moves G by c times the rate. With n numbers in the core and the waist K:

    a train from the waist to the layer's width     c = sqrt(K · width / n)
    a train from the layer's width to the waist     c = sqrt(K · sqrt(1024 · width) / n)

All other cores orthonormal about it, the first moves by rate · sqrt(K · width) in the Frobenius norm, as far as the
rate moves a LoRA's factor of waist x width. That would move the second too fast where the layer is wide, and 1024 in
the place of the width too slowly: it has their geometric mean, with which a rep adapter has one best rate from 256 to
4096 (docs/learning.md). Only the product of a side's gains matters to the function: it is rounded to a power of two,
which the shape holds (`TTShape.gains`); the rest is in the cores. The core that is zero at the start moves twice as far
as that, and the others of its side less, by so much that the side keeps its gain: a language model then learns faster
with rep at 3e-4 and 1e-3, without the collapse at 3e-3 of twice the gain for all cores (docs/learning.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loretta_kernels.shape import TTShape

ZERO_GAIN = 2.0  # how much further the core moves that is zero at the start; the others of its side make up for it


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
    reach = shape.out_features if up else math.sqrt(1024 * shape.in_features)
    gains = [math.sqrt(shape.waist * reach / size) for size in shape.core_sizes]
    if up:
        zero = _largest(shape)
        side = range(shape.cut, len(gains)) if zero >= shape.cut else range(shape.cut)
        others = [k for k in side if k != zero]
        if others:
            gains[zero] *= ZERO_GAIN
        for k in others:
            gains[k] *= ZERO_GAIN ** (-1 / len(others))
    return gains


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
    stored = [core / gain for core, gain in zip(cores_list, stored_gains(shape, up), strict=True)]
    return cores.copy_(torch.cat(stored))


def stored_gains(shape: TTShape, up: bool) -> list[float]:
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
