"""Tensor trains over any modes of a flattened matrix, brought to the normal form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from loretta_kernels import TTShape
from loretta_kernels.shape import balanced_modes
from loretta_kernels.svd import split_core


def normal_form(cores: Sequence[Tensor], in_features: int, out_features: int) -> tuple[list[Tensor], TTShape]:
    """A train over any modes of the flattened matrix as one whose cut lies between input and output; exact.

    Cores before and after the cut are kept as they are. What straddles it, one core or several where no mode fits, is
    one tensor ``[r, a·b, r']`` with a mode of the input and b of the output, and is split by SVDs of its unfoldings.
    The ranks of the result follow from the shapes alone, not from the values.

    Args:
        cores: ``[r, n, r']`` each, of a train for W flattened: the product of the modes is that of the two sizes.
        in_features, out_features: the sizes of W.

    Returns:
        The cores in fp64 where they were split and in their own dtype elsewhere, and their shape.

    Raises:
        ValueError: the cores are no train, or not one of that matrix.
    """
    _check_train(cores, in_features, out_features)
    modes = [core.shape[1] for core in cores]
    left = _fitting(modes, in_features)
    right = _fitting(modes[left:][::-1], out_features)
    stop = len(cores) - right
    kept_in, kept_out = modes[:left], modes[stop:]
    if left == stop:
        ranks = [core.shape[2] for core in cores[:-1]]
        return list(cores), TTShape(kept_in, kept_out, ranks)

    middle = cores[left].double()
    for core in cores[left + 1 : stop]:
        middle = torch.einsum("anb,bmc->anmc", middle, core.double()).flatten(1, 2)
    in_modes = balanced_modes(in_features // math.prod(kept_in))
    out_modes = balanced_modes(out_features // math.prod(kept_out))[::-1]
    split = split_core(middle, (*in_modes, *out_modes))
    result = [*cores[:left], *split, *cores[stop:]]
    ranks = [core.shape[2] for core in result[:-1]]
    return result, TTShape((*kept_in, *in_modes), (*out_modes, *kept_out), ranks)


def _fitting(modes: Sequence[int], size: int) -> int:
    """How many of the first modes are modes of a side of this size."""
    count = 0
    for product in accumulate(modes, mul):
        if size % product:
            break
        count += 1
    return count


def _check_train(cores: Sequence[Tensor], in_features: int, out_features: int) -> None:
    shapes = [tuple(core.shape) for core in cores]
    ranks_meet = bool(shapes) and all(len(shape) == 3 for shape in shapes)
    if ranks_meet:
        before, after = [1, *(shape[2] for shape in shapes)], [*(shape[0] for shape in shapes), 1]
        ranks_meet = before == after
    if not ranks_meet:
        raise ValueError(f"cores of shapes {shapes} are no tensor train: [1, n, r], [r, n, r'], ... [r, n, 1] is one")
    size = math.prod(shape[1] for shape in shapes)
    if size != in_features * out_features:
        raise ValueError(f"a train of {size} entries is no matrix of {in_features} x {out_features}")
