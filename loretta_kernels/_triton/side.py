"""One side of a tensor train as the kernels see it: plain Python, no torch.

A side is L [I, K] or R [K, O]. Its chain of cores is cut once more, into two factors that meet at a bond of rank A:

    L[(f, s), k] = sum_a light[f, a] · heavy[a, s, k]        R[k, (f, s)] = sum_a heavy[a, f, k] · light[s, a]

The heavy factor carries the waist, the light one does not. Both are tiny (256 x 5 and 5 x 16 x 5 for 4096 features at
rank 5), and a tile of 64 features is A multiply-adds an element: nothing of the size of the side is ever stored. A
side of few features, such as the bottleneck, is not cut: it is all heavy, and A is 1.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

from loretta_kernels.shape import TTShape

ALIGN = 32  # elements: a table starts on a line of 128 bytes
WHOLE = 512  # features up to which a side is one table
KEPT = 8  # heavy rows that a program keeps in registers
LARGEST_COPY = 16384  # elements of a single core that are worth copying into a table


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


@cache
def _digest_of(modules: tuple[str, ...]) -> str:
    """A digest of the modules' source."""
    return hashlib.sha256("".join(inspect.getsource(sys.modules[name]) for name in modules).encode()).hexdigest()


@dataclass(frozen=True)
class Side:
    """A side, its cut into two factors, and where its tables and gradients lie.

    Args:
        is_input: whether it is L, `[I, K]`, or R, `[K, O]`.
        modes, ranks: those of its cores; one rank more than modes.
        start: where its first core starts in the flat cores.
        factor: what the product of its cores is multiplied by.
        split: how many cores the first factor has.
        table: where its tables start among those of a program.
        grad: where its gradient starts in the buffer of sums.
    """

    is_input: bool
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    factor: float
    start: int
    split: int
    table: int = 0
    grad: int = 0

    def __str__(self) -> str:
        """What Triton's cache on disk knows a constant by: the fields, and the code that derives from them what the
        kernels read, which may be another in another version of this package."""
        return f"{self!r} {_digest_of(tuple(each.__module__ for each in type(self).__mro__[:-1]))}"

    @cached_property
    def count(self) -> int:
        """How many cores."""
        return len(self.modes)

    @cached_property
    def size(self) -> int:
        """Features: I or O."""
        return prod(self.modes)

    @cached_property
    def K(self) -> int:
        """The waist."""
        return self.ranks[-1] if self.is_input else self.ranks[0]

    @cached_property
    def KP(self) -> int:
        """Columns of a tile: a power of two, with room for a column of ones beside the waist."""
        return max(16, next_power_of_2(self.K + 1))

    @cached_property
    def KS(self) -> int:
        """Columns of a row of the heavy table: a power of two of at least 16 bytes, so that a row is loaded at once."""
        return max(4, next_power_of_2(self.K))

    @cached_property
    def A(self) -> int:
        """The rank of the bond between the factors."""
        return self.ranks[self.split]

    @cached_property
    def second(self) -> int:
        """Features of the second factor: feature c is (c // second, c % second)."""
        return prod(self.modes[self.split :])

    @cached_property
    def heavy(self) -> tuple[int, int]:
        """The cores of the heavy factor, from and to."""
        return (self.split, self.count) if self.is_input else (0, self.split)

    @cached_property
    def light(self) -> tuple[int, int]:
        """The cores of the light factor, from and to; none where the side is not cut."""
        return (0, self.split) if self.is_input else (self.split, self.count)

    @cached_property
    def has_light(self) -> bool:
        """Whether the side is cut."""
        return self.light[0] < self.light[1]

    @cached_property
    def heavy_size(self) -> int:
        """Features of the heavy factor."""
        return prod(self.modes[slice(*self.heavy)])

    @cached_property
    def light_size(self) -> int:
        """Features of the light factor."""
        return prod(self.modes[slice(*self.light)])

    @cached_property
    def core_starts(self) -> tuple[int, ...]:
        """Where each core starts in the flat cores."""
        return tuple(self.start + sum(self.core_sizes[:j]) for j in range(self.count))

    @cached_property
    def core_sizes(self) -> tuple[int, ...]:
        """Elements of each core."""
        return tuple(self.ranks[j] * n * self.ranks[j + 1] for j, n in enumerate(self.modes))

    @cached_property
    def end(self) -> int:
        """Where its last core ends; of R the size of the flat cores."""
        return self.core_starts[-1] + self.core_sizes[-1]

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Of each core as a matrix `[r, n·r']`, n·r'."""
        return tuple(n * self.ranks[j + 1] for j, n in enumerate(self.modes))

    def product_size(self, lo: int, hi: int) -> int:
        """Elements of the product of the cores from lo to hi."""
        return self.ranks[lo] * prod(self.modes[lo:hi]) * self.ranks[hi]

    @cached_property
    def heavy_is_core(self) -> bool:
        """Whether the heavy factor is read from its core: a single one, and too large to copy."""
        lo, hi = self.heavy
        return hi - lo == 1 and self.A * self.heavy_size * self.KS > LARGEST_COPY

    @cached_property
    def heavy_strides(self) -> tuple[int, int, int]:
        """The strides of the bond, the feature and the waist in the heavy factor, wherever it is read."""
        if not self.heavy_is_core:
            return self.heavy_size * self.KS, self.KS, 1
        return (self.heavy_size * self.K, self.K, 1) if self.is_input else (1, self.A, self.heavy_size * self.A)

    def keeps_heavy(self, block: int) -> bool:
        """Whether every block of features has the same heavy rows, few enough to stay in registers."""
        return self.is_input and self.has_light and block % self.second == 0 and self.A <= KEPT

    def shares_heavy(self, block: int) -> bool:
        """Whether the features of a block all have the same heavy row."""
        return not self.is_input and self.second % block == 0

    def loaded_bytes(self, block: int) -> int:
        """Bytes of the tables' rows that a block of features is made of, where every feature loads its own."""
        if self.keeps_heavy(block) or self.shares_heavy(block):
            return 0
        return 4 * self.A * block * (self.KP + self.has_light)

    def form(self, block: int) -> str:
        """How a block of features is made."""
        if not self.has_light:
            return "read from its core" if self.heavy_is_core else "one table"
        if self.keeps_heavy(block):
            return "heavy rows in registers, light ones read"
        if self.shares_heavy(block):
            return "one heavy row a block, light ones read"
        return "heavy and light rows read" if self.A <= 16 else "heavy and light rows read, in a loop over the bond"

    @cached_property
    def heavy_table(self) -> int:
        """Where the heavy table `[A, features, KS]` starts."""
        return self.table

    @cached_property
    def light_table(self) -> int:
        """Where the light table `[features, A]` starts."""
        return self.table + (0 if self.heavy_is_core else round_up(self.A * self.heavy_size * self.KS, ALIGN))

    @cached_property
    def partials(self) -> tuple[int, ...]:
        """Where the product of a factor's cores up to core j is kept while its table is made."""
        starts, at = [], self.light_table + (round_up(self.light_size * self.A, ALIGN) if self.has_light else 0)
        for j in range(self.count):
            starts.append(at)
            for lo, hi in (self.heavy, self.light):
                if lo < j < hi - 1:
                    at += round_up(self.product_size(lo, j + 1), ALIGN)
        return (*starts, at)

    @cached_property
    def table_end(self) -> int:
        """Where its tables end."""
        return self.partials[-1]

    @cached_property
    def grad_c(self) -> int:
        """The stride of a feature in the gradient: `[I, K]`, or `[K + 1, O]` with that of the bias for its last row."""
        return self.K if self.is_input else 1

    @cached_property
    def grad_k(self) -> int:
        """The stride of the waist in the gradient."""
        return 1 if self.is_input else self.size

    @cached_property
    def grad_end(self) -> int:
        """Where its gradient ends."""
        return self.grad + round_up(self.size * (self.K + (not self.is_input)), ALIGN)

    @cached_property
    def chain_partials(self) -> tuple[int, ...]:
        """Where the product of the cores up to j starts in the scratch of the contraction; then the end of them."""
        starts, at = [0], 0
        for j in range(1, self.count - 1):
            starts.append(at)
            at += round_up(self.product_size(0, j + 1), ALIGN)
        return (*starts, at)

    @cached_property
    def chain_rows(self) -> tuple[int, ...]:
        """Rows of the product of the cores before j, as a matrix `[rows, r]`."""
        return tuple(self.ranks[0] * prod(self.modes[:j]) for j in range(self.count))

    @cached_property
    def chain_grads(self) -> tuple[int, ...]:
        """Where the gradient of the product of the cores before j starts in that scratch; then its end."""
        starts, at = [0], self.chain_partials[-1]
        for j in range(1, self.count):
            starts.append(at)
            at += round_up(self.chain_rows[j] * self.ranks[j], ALIGN)
        return (*starts, at)

    @cached_property
    def flops(self) -> int:
        """Multiply-adds that make the side's tiles once."""
        return self.size * self.A * self.KP


def sides(shape: TTShape, table: int = 0, grad: int = 0) -> tuple[Side, Side]:
    """L and R of a train, their tables and gradients one behind the other."""
    cut, start = shape.cut, sum(shape.core_sizes[: shape.cut])
    in_factor, out_factor = shape.factors
    left = _side(True, shape.in_modes, shape.bond_ranks[: cut + 1], in_factor, 0, table, grad)
    right = _side(False, shape.out_modes, shape.bond_ranks[cut:], out_factor, start, left.table_end, left.grad_end)
    return left, right


def _side(
    is_input: bool, modes: tuple[int, ...], ranks: tuple[int, ...], factor: float, start: int, table: int, grad: int
) -> Side:
    """The side with the cheapest cut; one of few features, or of a single core, is not cut."""
    whole = Side(is_input, modes, ranks, factor, start, 0 if is_input else len(modes), table, grad)
    if len(modes) == 1 or whole.size <= WHOLE:
        return whole
    cuts = (Side(is_input, modes, ranks, factor, start, split, table, grad) for split in range(1, len(modes)))
    return min(cuts, key=lambda side: side.flops + (side.table_end - side.table) * max(ranks))
