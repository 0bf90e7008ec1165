"""A side as the kernels see it that keep whole rows on the chip: plain Python, no torch.

A side's chain of cores is cut into an outer and an inner factor, so that a row is a matrix [outer, inner]:

    L[(o, i), k] = sum_a outer[o, a] · inner[a, i, k]        R[k, (o, i)] = sum_a outer[k, o, a] · inner[a, i]

The side of a bottleneck is not cut. A factor is one core, or a product of cores that a program makes in its tables, in
the order of a core: [bond, features, bond].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
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
