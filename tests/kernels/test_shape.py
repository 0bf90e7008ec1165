"""TTShape: modes, ranks, the paper's table, balanced modes, errors."""

from __future__ import annotations

import copy
import pickle
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loretta_kernels import TTShape
from loretta_kernels.shape import balanced_modes

PAPER_COUNTS = [
    (4096, 64, 5, 1100),
    (768, 64, 5, 780),
    (768, 8, 5, 580),
    (2304, 8, 5, 585),
    (768, 768, 5, 1080),
    (4096, 16, 8, 1888),
    (5120, 64, 8, 2664),
]


@pytest.mark.parametrize(("I", "O", "rank", "count"), PAPER_COUNTS)
def test_has_the_papers_parameter_count_both_ways(I, O, rank, count):
    assert TTShape.for_matrix(I, O, rank).num_params == count
    assert TTShape.for_matrix(O, I, rank).num_params == count


@pytest.mark.parametrize(
    ("I", "O", "in_modes", "out_modes"),
    [
        (4096, 64, (16, 16, 16), (4, 4, 4)),
        (64, 4096, (4, 4, 4), (16, 16, 16)),
        (64, 768, (8, 8), (12, 8, 8)),
        (16, 768, (4, 4), (12, 8, 8)),
        (32, 768, (4, 8), (12, 8, 8)),
        (8, 2304, (8,), (8, 8, 4, 9)),
        (8192, 64, (4, 16, 16, 8), (16, 4)),
        (64, 5120, (8, 8), (16, 8, 8, 5)),
        (768, 768, (8, 8, 12), (12, 8, 8)),
        (1024, 1024, (4, 8, 8, 4), (4, 8, 8, 4)),
    ],
)
def test_uses_the_papers_modes(I, O, in_modes, out_modes):
    shape = TTShape.for_matrix(I, O, 5)
    assert (shape.in_modes, shape.out_modes) == (in_modes, out_modes)


def test_derives_everything_from_modes_and_ranks():
    shape = TTShape((8, 8, 12), (8, 4), (2, 3, 4, 5))
    assert (shape.in_features, shape.out_features) == (768, 32)
    assert shape.modes == (8, 8, 12, 8, 4)
    assert shape.cut == 3
    assert shape.bond_ranks == (1, 2, 3, 4, 5, 1)
    assert shape.waist == 4
    assert shape.core_shapes == ((1, 8, 2), (2, 8, 3), (3, 12, 4), (4, 8, 5), (5, 4, 1))
    assert shape.num_params == 16 + 48 + 144 + 160 + 20


def test_one_rank_means_every_bond_and_is_never_clipped():
    assert TTShape((2,), (2, 2), 7).bond_ranks == (1, 7, 7, 1)


def test_is_a_value():
    shape = TTShape([4, 3], [2, 5], 2)
    assert shape == TTShape((4, 3), (2, 5), (2, 2, 2)) != TTShape((4, 3), (5, 2), 2)
    assert len({shape, TTShape((4, 3), (2, 5), 2)}) == 1
    assert shape == pickle.loads(pickle.dumps(shape)) == copy.deepcopy(shape) == eval(repr(shape))
    assert TTShape.from_spec(shape.spec) == shape
    with pytest.raises(AttributeError):
        shape.cut = 1


def test_gains_are_part_of_the_value():
    shape = TTShape((4, 3), (2, 5), 2, gains=(3, -1))
    assert shape != TTShape((4, 3), (2, 5), 2)
    assert shape.factors == (8.0, 0.5)
    assert TTShape.from_spec(shape.spec) == shape == eval(repr(shape))
    assert TTShape((4, 3), (2, 5), 2).gains == (0, 0)


def test_takes_numpy_integers_and_keeps_plain_ones():
    shape = TTShape(np.array([4, 3]), (np.int64(2),), np.int32(2))
    assert shape == TTShape((4, 3), (2,), 2)
    assert {type(n) for n in (*shape.modes, *shape.ranks)} == {int}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (((), (2,), 2), ValueError, "at least one mode"),
        (((4, 0), (2,), 2), ValueError, r"in_modes must be at least 1, got \(4, 0\)"),
        (((4,), (-2,), 2), ValueError, r"out_modes must be at least 1, got \(-2,\)"),
        (((4,), (2,), 0), ValueError, "ranks must be at least 1"),
        (((4, 4), (2,), (3,)), ValueError, r"2 inner bonds, got 1 ranks: \(3,\)"),
        (((4.0,), (2,), 2), TypeError, r"in_modes must be ints, got \(4.0,\)"),
        (((4,), (2,), True), TypeError, "ranks must be ints"),
        (((4,), (2,), "5"), TypeError, "ranks must be ints"),
        (((4,), (2,), 2, (1,)), ValueError, r"gains must be two exponents from -64 to 64, got \(1,\)"),
        (((4,), (2,), 2, (0, 65)), ValueError, r"gains must be two exponents"),
        (((4,), (2,), 2, (0.5, 0)), TypeError, r"gains must be ints, got \(0.5, 0\)"),
    ],
)
def test_names_what_is_wrong(arguments, kind, message):
    with pytest.raises(kind, match=message):
        TTShape(*arguments)


@pytest.mark.parametrize(("I", "O", "rank"), [(0, 4, 2), (4, -1, 2), (4, 4, 0)])
def test_rejects_a_matrix_without_rows_or_columns_or_rank(I, O, rank):
    with pytest.raises(ValueError, match="at least 1"):
        TTShape.for_matrix(I, O, rank)


@pytest.mark.parametrize(
    ("size", "modes"),
    [
        (1, (1,)),
        (13, (13,)),
        (17, (17,)),
        (64, (8, 8)),
        (576, (8, 8, 9)),
        (2048, (8, 16, 16)),
        (2560, (10, 16, 16)),
        (3072, (12, 16, 16)),
        (3584, (14, 16, 16)),
        (11008, (43, 16, 16)),
        (14336, (8, 8, 14, 16)),
        (18944, (37, 8, 8, 8)),
        (28672, (8, 14, 16, 16)),
        (53248, (13, 16, 16, 16)),
    ],
)
def test_balances_the_sizes_of_real_models(size, modes):
    assert balanced_modes(size) == modes


@given(st.integers(1, 200_000))
@settings(derandomize=True, max_examples=300)
def test_balanced_modes_multiply_to_the_size_and_only_primes_exceed_sixteen(size):
    modes = balanced_modes(size)
    assert prod(modes) == size
    large = [mode for mode in modes if mode > 16]
    assert all(mode % divisor for mode in large for divisor in range(2, int(mode**0.5) + 1))
    assert modes == (1,) or 1 not in modes


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 9))
@settings(derandomize=True, max_examples=100)
def test_the_other_direction_is_the_mirror_image(I, O, rank):
    there, back = TTShape.for_matrix(I, O, rank), TTShape.for_matrix(O, I, rank)
    assert there.modes == back.modes[::-1] or I == O
    assert (there.in_features, there.out_features) == (I, O)
    assert there.num_params == back.num_params
