"""Which rows use which adapter, sorted once for a batch and used by every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from loretta_kernels._torch.contraction import Snapshot

_T = TypeVar("_T")
_sorted = WeakTensorKeyDictionary()


@dataclass(frozen=True, eq=False)
class Groups:
    """An index of adapters that was checked and sorted, to be given as `index=` to the operators of all layers.

    Make it with `Groups.of`. It is a pytree, as `TT` is.

    Attributes:
        index: as given to `of`: a copy, on the device of the rows.
        adapters: how many adapters are stacked.

    Example:
        >>> groups = Groups.of(torch.tensor([2, -1, 0, 2]), adapters=3)
        >>> shape = TTShape.for_matrix(768, 96, rank=5)
        >>> stack = TT(torch.randn(3, shape.num_params), shape)
        >>> tt_linear(torch.randn(4, 10, 768), stack, index=groups).shape
        torch.Size([4, 10, 96])
    """

    index: Tensor
    adapters: int

    @classmethod
    def of(cls, index: Tensor, adapters: int, device: torch.device | str | None = None) -> Groups:
        """Check an index and sort it, once for all layers of a batch.

        Args:
            index: int64 or int32, for the first of x's leading dimensions: `[B]` gives an adapter to every sequence of
                x `[B, T, I]`, `[B, T]` to every token. -1 is no adapter.
            adapters: how many adapters are stacked.
            device: of the rows; by default the index's. Reading an index that is on a GPU waits for that GPU, here and
                nowhere else; one on the CPU is only copied there.

        Raises:
            TypeError, ValueError: another dtype; an adapter below -1, or one that is not in the stack.
        """
        check_index(index)
        groups = cls(index.detach().to(device, copy=True), adapters)
        _sorted[groups.index] = None, Sorted(index, adapters)  # nobody else can write to this copy
        return groups

    def to(self, device: torch.device) -> Groups:
        """The same groups for rows on another device."""
        if device == self.index.device:
            return self
        moved = Groups(self.index.to(device), self.adapters)
        _sorted[moved.index] = None, sorted_of(self.index, self.adapters)
        return moved


class Run(NamedTuple):
    """Neighbouring groups of one size.

    Attributes:
        first, last: the groups, from and to.
        start: where the first of them starts in the order.
        size: elements of each.
    """

    first: int
    last: int
    start: int
    size: int


class Sorted:
    """The elements of an index, adapter after adapter: those of the smallest group first, those without adapter last.

    Args:
        index: any shape; its elements count row-major.
        adapters: how many are stacked.

    Attributes:
        adapters: as given.
        order: `[M]` int64 on the CPU, the elements; in each group as they were.
        present: the adapters in use, in that order.
        starts: where each of their groups starts, and where the elements without adapter do.
        runs: the groups by size.

    Raises:
        ValueError: an adapter below -1, or one that is not in the stack.
    """

    def __init__(self, index: Tensor, adapters: int) -> None:
        flat = index.detach().reshape(-1).to("cpu", torch.int64)
        if len(flat) and not (int(flat.min()) >= -1 and int(flat.max()) < adapters):
            raise ValueError(
                f"index must be from -1, no adapter, to {adapters - 1}, the last in the stack, got values from "
                f"{int(flat.min())} to {int(flat.max())}"
            )
        self.adapters = adapters
        counts = torch.bincount(flat + 1, minlength=adapters + 1)
        counts[0] = len(flat) + 1  # sorts last
        by_size = torch.argsort(counts, stable=True)
        rank = torch.empty_like(by_size)
        rank[by_size] = torch.arange(len(by_size))
        self.order = torch.argsort(rank[flat + 1], stable=True)
        self.present: list[int] = []
        self.starts, self.runs = [0], list[Run]()
        for adapter, count in zip((by_size[:-1] - 1).tolist(), counts[by_size[:-1]].tolist(), strict=True):
            if count:
                self._append(adapter, count)
        # Elements whose number does not follow on that before: between them a slice of the rows is a view.
        self._breaks = torch.cat([torch.zeros(1), (self.order.diff() != 1).cumsum(0)]).tolist() if len(flat) else []
        self._made: dict[tuple[Any, ...], Any] = {}

    def _append(self, adapter: int, count: int) -> None:
        start, group = self.starts[-1], len(self.present)
        if self.runs and self.runs[-1].size == count:
            self.runs[-1] = self.runs[-1]._replace(last=group + 1)
        else:
            self.runs.append(Run(group, group + 1, start, count))
        self.present.append(adapter)
        self.starts.append(start + count)

    @property
    def used(self) -> int:
        """How many elements have an adapter."""
        return self.starts[-1]

    @property
    def largest(self) -> int:
        """Elements of the largest group."""
        return self.runs[-1].size if self.runs else 0

    def first_if_adjacent(self, start: int, stop: int, each: int) -> int | None:
        """The number of the first of these rows in the order where they follow on each other in x; otherwise None."""
        if self._breaks[start // each] != self._breaks[(stop - 1) // each]:
            return None
        return int(self.order[start // each]) * each + start % each

    def made(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        """What `make` computes from these groups, once for a key."""
        if key not in self._made:
            self._made[key] = make()
        made: _T = self._made[key]
        return made

    def rows(self, each: int, device: torch.device) -> Tensor:
        """The rows in order, `[M · each]` int64, where every element of the index stands for `each` rows."""

        def make() -> Tensor:
            rows = self.order if each == 1 else (self.order[:, None] * each + torch.arange(each)).view(-1)
            return rows.to(device, non_blocking=True)

        return self.made(("rows", each, device), make)

    def items(self, each: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows cut into items of one adapter and at most so many rows: what a program of a kernel takes.

        Returns:
            Items `[items, 5]`: adapter, its rows in order from and to, group, items of that group; the last are those
            of rows without an adapter, -1. Groups `[groups, 3]`: adapter, first item, items. Both int32.
        """

        def make() -> tuple[Tensor, Tensor]:
            items: list[list[int]] = []
            groups: list[list[int]] = []
            for group, adapter in enumerate(self.present):
                start, stop = self.starts[group] * each, self.starts[group + 1] * each
                count = -(-(stop - start) // most)
                groups.append([adapter, len(items), count])
                items += [[adapter, at, min(at + most, stop), group, count] for at in range(start, stop, most)]
            stop = len(self.order) * each
            items += [[-1, at, min(at + most, stop), 0, 0] for at in range(self.used * each, stop, most)]
            of_items, of_groups = (
                torch.tensor(table, dtype=torch.int32).view(-1, size) for table, size in ((items, 5), (groups, 3))
            )
            return of_items.to(device, non_blocking=True), of_groups.to(device, non_blocking=True)

        return self.made(("items", each, most, device), make)

    def present_on(self, device: torch.device) -> Tensor:
        """`present` as a tensor."""
        return self.made(("present", device), lambda: torch.tensor(self.present, device=device))


def sorted_of(index: Tensor, adapters: int) -> Sorted:
    """The index sorted; what `Groups.of` made of it, or an earlier call, where that is known to be of the same values.

    Raises:
        ValueError: as `Sorted`.
    """
    written, known = _sorted.get(index, (None, None))
    if known is None or known.adapters != adapters or not (written is None or written.is_of(index)):
        known = Sorted(index, adapters)
        _sorted[index] = Snapshot(index), known
    return known


def check_index(index: Any) -> None:
    """Raise unless it is a tensor of whole numbers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        found = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be Groups, or a tensor of int64 or int32, got {found}")


def _flatten(groups: Groups) -> tuple[list[Any], int]:
    return [groups.index], groups.adapters


def _flatten_with_keys(groups: Groups) -> tuple[list[tuple[pytree.KeyEntry, Any]], int]:
    return [(pytree.GetAttrKey("index"), groups.index)], groups.adapters


def _unflatten(tensors: Any, adapters: int) -> Groups:
    (index,) = tensors
    return Groups(index, adapters)


pytree.register_pytree_node(
    Groups,
    _flatten,
    _unflatten,
    serialized_type_name="loretta_kernels.Groups",
    to_dumpable_context=int,
    from_dumpable_context=int,
    flatten_with_keys_fn=_flatten_with_keys,
)
