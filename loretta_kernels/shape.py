"""The shape of a tensor train whose cut lies between input and output: plain Python, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import prod
from operator import index

MAX_MODE = 16
# Of any bond, unless the matrix has a larger side: no train needs more; catches typos before they exhaust memory.
MAX_RANK = 64
MAX_GAIN = 64  # in absolute value: 2 ** 64 is far from fp32's largest number

# LoRETTA, table 10, and what the released code adds to it. The other direction of each is its mirror image.
_PAPER_MODES: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    (768, 8): ((8, 8, 12), (8,)),
    (768, 16): ((8, 8, 12), (4, 4)),
    (768, 32): ((8, 8, 12), (8, 4)),
    (768, 64): ((8, 8, 12), (8, 8)),
    (768, 768): ((8, 8, 12), (12, 8, 8)),
    (1024, 1024): ((4, 8, 8, 4), (4, 8, 8, 4)),
    (4096, 8): ((8, 8, 8, 8), (8,)),
    (4096, 16): ((8, 8, 8, 8), (4, 4)),
    (4096, 32): ((8, 8, 8, 8), (8, 4)),
    (4096, 64): ((16, 16, 16), (4, 4, 4)),
    (5120, 64): ((5, 8, 8, 16), (8, 8)),
    (8192, 64): ((4, 16, 16, 8), (16, 4)),
    (2304, 8): ((9, 4, 8, 8), (8,)),
}


@dataclass(frozen=True)
class TTShape:
    """Modes and bond ranks of a tensor train for a matrix `[in_features, out_features]`.

        W[(i1..ip), (o1..oq)] = G1[i1] ··· Gp[ip] · G(p+1)[o1] ··· G(p+q)[oq] · 2 ** (gain_in + gain_out)

    with cores Gk of shape `[r(k-1), n(k), r(k)]`.

    Args:
        in_modes: `i1..ip`, whose product is `in_features`.
        out_modes: `o1..oq`, whose product is `out_features`.
        ranks: an int, the rank of every inner bond (never clipped: the paper's parameter counts depend on it), or one
            rank for each of the `p + q - 1` inner bonds. Stored as a tuple.
        gains: two exponents of 2, by which the product of the input cores and that of the output cores are multiplied.
            They decide how far one step of an optimiser moves W, and nothing else (see DESIGN.md).

    Attributes:
        modes: all modes, input then output.
        cut: how many cores lie on the input side.
        bond_ranks: `(1, *ranks, 1)`.
        waist: the rank of the bond at the cut, so that `W = L [I, waist] · R [waist, O]`.
        factors: what L and R are multiplied by, `2.0 ** gain` each.
        core_shapes: `(r(k-1), n(k), r(k))` of each core.
        num_params: the length of the flat tensor that holds the cores.

    Raises:
        TypeError: a mode, a rank or a gain is not an int.
        ValueError: a side without modes, a mode or a rank below 1, or the wrong number of ranks or gains.

    Example:
        >>> shape = TTShape((16, 16, 16), (4, 4, 4), ranks=5)
        >>> shape.in_features, shape.out_features, shape.num_params
        (4096, 64, 1100)

    Source: LoRETTA (NAACL 2024, arXiv 2402.11417), its tensor-train format, with one rank per bond.
    """

    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    ranks: tuple[int, ...]
    gains: tuple[int, int]
    in_features: int = field(init=False, repr=False, compare=False)
    out_features: int = field(init=False, repr=False, compare=False)
    modes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    cut: int = field(init=False, repr=False, compare=False)
    bond_ranks: tuple[int, ...] = field(init=False, repr=False, compare=False)
    waist: int = field(init=False, repr=False, compare=False)
    factors: tuple[float, float] = field(init=False, repr=False, compare=False)
    core_shapes: tuple[tuple[int, int, int], ...] = field(init=False, repr=False, compare=False)
    core_sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    num_params: int = field(init=False, repr=False, compare=False)
    spec: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        in_modes: Iterable[int],
        out_modes: Iterable[int],
        ranks: int | Iterable[int],
        gains: Iterable[int] = (0, 0),
    ) -> None:
        left, right = _positive("in_modes", in_modes), _positive("out_modes", out_modes)
        bonds = len(left) + len(right) - 1
        inner = _positive("ranks", ranks) if isinstance(ranks, Iterable) else _positive("ranks", (ranks,)) * bonds
        if not left or not right:
            raise ValueError(f"each side needs at least one mode, got in_modes={left} and out_modes={right}")
        if len(inner) != bonds:
            raise ValueError(f"modes {left} | {right} have {bonds} inner bonds, got {len(inner)} ranks: {inner}")
        largest = max(prod(left), prod(right), MAX_RANK)
        if max(inner, default=1) > largest:
            raise ValueError(
                f"no rank of a {prod(left)} x {prod(right)} matrix may be above {largest}, got {max(inner)}"
            )
        exponents = _ints("gains", gains)
        if len(exponents) != 2 or max(map(abs, exponents)) > MAX_GAIN:
            raise ValueError(f"gains must be two exponents from -{MAX_GAIN} to {MAX_GAIN}, got {exponents}")
        modes, bond_ranks = left + right, (1, *inner, 1)
        core_shapes = tuple(zip(bond_ranks, modes, bond_ranks[1:], strict=False))
        core_sizes = tuple(prod(core) for core in core_shapes)
        for name, value in {
            "in_modes": left,
            "out_modes": right,
            "ranks": inner,
            "gains": exponents,
            "in_features": prod(left),
            "out_features": prod(right),
            "modes": modes,
            "cut": len(left),
            "bond_ranks": bond_ranks,
            "waist": bond_ranks[len(left)],
            "factors": tuple(2.0**exponent for exponent in exponents),
            "core_shapes": core_shapes,
            "core_sizes": core_sizes,
            "num_params": sum(core_sizes),
            "spec": (len(left), *modes, *inner, *exponents),
        }.items():
            object.__setattr__(self, name, value)

    @classmethod
    def for_matrix(cls, in_features: int, out_features: int, rank: int | Iterable[int]) -> TTShape:
        """The paper's modes for this matrix where it lists some, otherwise each side in balanced modes.

        Args:
            in_features, out_features: any sizes from 1 up.
            rank: as `ranks` of the class.

        Raises:
            TypeError, ValueError: as the class does, and for sizes below 1.

        Example:
            >>> TTShape.for_matrix(4096, 64, rank=5).modes
            (16, 16, 16, 4, 4, 4)

        Source: LoRETTA, table 10 (appendix).
        """
        I, O = _positive("in_features, out_features", (in_features, out_features))
        if (I, O) in _PAPER_MODES:
            in_modes, out_modes = _PAPER_MODES[I, O]
        elif (O, I) in _PAPER_MODES:
            out_modes, in_modes = (side[::-1] for side in _PAPER_MODES[O, I])
        else:
            in_modes, out_modes = balanced_modes(I), balanced_modes(O)[::-1]
        return cls(in_modes, out_modes, rank)

    @staticmethod
    @cache
    def from_spec(spec: tuple[int, ...]) -> TTShape:
        """The shape whose `spec` is this: `(cut, *modes, *ranks, *gains)`, the form in which operators carry it."""
        cut, middle = spec[0], len(spec) // 2
        return TTShape(spec[1 : cut + 1], spec[cut + 1 : middle], spec[middle:-2], spec[-2:])


@cache
def balanced_modes(size: int) -> tuple[int, ...]:
    """`size` as the fewest modes of at most 16, as even as they can be, smallest first.

    A prime factor above 16 is a mode of its own, placed first: there its core has only one inner bond.
    """
    large = [prime for prime in _prime_factors(size) if prime > MAX_MODE]
    rest = size // prod(large)
    if rest == 1:
        return tuple(large) or (1,)
    count = 1
    while not (choices := list(_factorings(rest, count, 2))):
        count += 1
    return (*reversed(large), *min(choices, key=sum))


def _prime_factors(size: int) -> list[int]:
    """The prime factors of `size`, smallest first."""
    factors, prime = [], 2
    while prime * prime <= size:
        if size % prime:
            prime += 1
        else:
            factors.append(prime)
            size //= prime
    return [*factors, size] if size > 1 else factors


def _factorings(size: int, count: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """`size` as a product of `count` modes, none above 16 and none below `smallest`, in rising order."""
    if count == 1:
        if smallest <= size <= MAX_MODE:
            yield (size,)
        return
    for mode in range(smallest, MAX_MODE + 1):
        if size % mode == 0:
            yield from ((mode, *others) for others in _factorings(size // mode, count - 1, mode))


def _positive(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """`values` as a tuple of ints from 1 up, or an error that names them."""
    values = _ints(name, values)
    if any(value < 1 for value in values):
        raise ValueError(f"{name} must be at least 1, got {values}")
    return values


def _ints(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """`values` as a tuple of ints, or an error that names them."""
    values = tuple(values)
    if any(isinstance(value, bool) or not hasattr(value, "__index__") for value in values):
        raise TypeError(f"{name} must be ints, got {values}")
    return tuple(index(value) for value in values)
