"""A side as the kernels see it that keep whole rows on the chip: plain Python, no torch.

A side's chain of cores is cut into an outer and an inner factor, so that a row is a matrix [outer, inner]:

    L[(o, i), k] = sum_a outer[o, a] · inner[a, i, k]        R[k, (o, i)] = sum_a outer[k, o, a] · inner[a, i]

The side of a bottleneck is not cut. A factor is one core, or a product of cores that a program makes in its tables, in
the order of a core: [bond, features, bond].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from math import prod

from loretta_kernels._triton.side import ALIGN, Side, next_power_of_2, round_up, sides
from loretta_kernels.shape import TTShape

INNER = 256  # inner features that a row has at best
MOST_OUTER = 128  # outer features, where there is a choice


@dataclass(frozen=True)
class RowSide(Side):
    """A side of which `split` cores are the outer factor; none of them where it is not cut."""

    @property
    def is_cut(self) -> bool:
        """Whether it has two factors."""
        return 0 < self.split < self.count

    @cached_property
    def outer(self) -> int:
        """Features of the outer factor."""
        return prod(self.modes[: self.split])

    @cached_property
    def inner(self) -> int:
        """Features of the inner factor."""
        return prod(self.modes[self.split :])

    @cached_property
    def OP(self) -> int:
        """Outer features of a tile."""
        return next_power_of_2(self.outer)

    @cached_property
    def IP(self) -> int:
        """Inner features of a tile."""
        return next_power_of_2(self.inner)

    @cached_property
    def AP(self) -> int:
        """Indices of a tile for the bond between the factors."""
        return max(8, next_power_of_2(self.A))

    @cached_property
    def QP(self) -> int:
        """Indices of a tile for the waist."""
        return max(8, next_power_of_2(self.K))

    @cached_property
    def CP(self) -> int:
        """Columns of a tile for all pairs of an index of the bond between the factors and one of the waist."""
        return max(16, next_power_of_2(self.A * self.K))

    @cached_property
    def outer_factor(self) -> Side:
        """The outer factor as a side of its own, for its gradient."""
        factor, ranks = 1.0 if self.is_input else self.factor, self.ranks[: self.split + 1]
        return Side(True, self.modes[: self.split], ranks, factor, self.start, 0, grad=self.grad)

    @cached_property
    def inner_factor(self) -> Side:
        """The inner factor as a side of its own, for its gradient."""
        factor, ranks = self.factor if self.is_input else 1.0, self.ranks[self.split :]
        grad = self.grad + round_up(self.product_size(0, self.split), ALIGN)
        return Side(True, self.modes[self.split :], ranks, factor, self.core_starts[self.split], 0, grad=grad)

    @cached_property
    def factors(self) -> tuple[Side, ...]:
        """What the gradients of its cores are contracted from."""
        return (self.outer_factor, self.inner_factor) if self.is_cut else (self,)

    @cached_property
    def bias_grad(self) -> int:
        """Where the gradient of its bias starts, behind those of its factors."""
        last = self.factors[-1]
        return last.grad + round_up(last.product_size(0, last.count), ALIGN)

    @cached_property
    def grad_end(self) -> int:
        """Where its gradient ends."""
        return self.bias_grad + (0 if self.is_input else round_up(self.size, ALIGN))

    @cached_property
    def levels(self) -> int:
        """Cores of its longer factor."""
        return max(self.split, self.count - self.split)

    @cached_property
    def products(self) -> tuple[int, ...]:
        """Where the product of a factor's cores up to core j is kept, for a core j that is not its first."""
        starts, at = [], self.table
        for j in range(self.count):
            first = 0 if j < self.split else self.split
            starts.append(at)
            if j > first:
                at += round_up(self.product_size(first, j + 1), ALIGN)
        return (*starts, at)

    def product_rows(self, first: int, j: int) -> int:
        """Rows of the product of the cores from `first` to before j, as a matrix `[rows, r]`."""
        return self.product_size(first, j) // self.ranks[j]

    @cached_property
    def table_end(self) -> int:
        """Where its tables end."""
        return self.products[-1]


@dataclass(frozen=True)
class Kept:
    """Where the tables lie that a program of the backward keeps in memory, one without gaps behind the other.

    The sums over rows that have the size of a table lie as the tables do.

    Args:
        tables: where the tables start, behind the products of cores.
        sums: where the sums start, behind the gradients of the factors.
        down_whole, up_whole, down_bias, down_packed, up_packed: from their start, of tables that are sums too.
        sums_end: where the sums end.
        up_outer, down_waist, up_waist: from the start of the tables.
        end: where the tables end.
    """

    tables: int
    sums: int
    down_whole: int
    up_whole: int
    down_bias: int
    down_packed: int
    up_packed: int
    sums_end: int
    up_outer: int
    down_waist: int
    up_waist: int
    end: int


def kept(sides: tuple[RowSide, ...]) -> Kept:
    """Those of one train, or of two."""
    first, last = sides[0], sides[-1]
    whole = [side.QP * side.IP for side in sides[1:-1]] or [0, 0]
    bias = sides[1].IP if len(sides) == 4 else 0
    sizes = (
        *whole, bias, first.OP * first.CP, last.OP * last.CP, 0,
        last.QP * last.OP * last.AP, first.QP * first.CP, last.QP * last.CP,
    )  # fmt: skip
    starts = accumulate((round_up(size, ALIGN) for size in sizes), initial=0)
    return Kept(last.table_end, last.grad_end, *starts)


def row_sides(down: TTShape, up: TTShape | None) -> tuple[RowSide, ...]:
    """The sides of one train, or of two: those of the rows are cut where a tile is filled best, the middle is not."""
    found: list[RowSide] = []
    given = sides(down) if up is None else (*sides(down), *sides(up))
    for index, side in enumerate(given):
        whole = {field.name: getattr(side, field.name) for field in fields(Side)} | {"split": 0}
        row_side = RowSide(**whole)
        if found:
            row_side = replace(row_side, table=found[-1].table_end, grad=found[-1].grad_end)
        if index in (0, len(given) - 1):
            cuts = (replace(row_side, split=split) for split in range(1, side.count))
            row_side = min(
                cuts, key=lambda cut: (cut.OP * cut.IP, cut.OP > MOST_OUTER, abs(cut.inner - INNER)), default=row_side
            )
        found.append(row_side)
    return tuple(found)
