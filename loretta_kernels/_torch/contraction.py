"""The two sides of a tensor train, and the gradients of the cores from those of the sides.

W = L · R,   L [I, K] the product of the input cores,   R [K, O] that of the output cores, each times its gain

What depends on parameters alone is cached for as long as they live, and used while their values are the same: backward
needs it again, and so does every forward until the next step of an optimiser.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loretta_kernels.shape import TTShape

_latest = WeakTensorKeyDictionary()
_local = threading.local()


@contextmanager
def frozen() -> Iterator[None]:
    """Promise that no core, bias or scale is changed inside, on this thread.

    PyTorch's path then contracts each train once, on any device. Outside, on a CPU, it compares parameters with those
    of its latest contraction, number by number (version counters do not see every write: `.data`, NumPy, custom
    optimisers), and elsewhere it contracts at every call. The Triton kernels contract inside their launch.

    Example:
        >>> layer = TTLinear(768, 768, rank=5)
        >>> with torch.no_grad(), frozen():
        ...     for _ in range(3):
        ...         y = layer(torch.randn(4, 768))
    """
    before = getattr(_local, "frozen", False)
    _local.frozen = True
    try:
        yield
    finally:
        _local.frozen = before


class Snapshot:
    """A parameter's value at one time, to compare with later ones."""

    def __init__(self, value: Any) -> None:
        self.identity = _identity(value)
        if isinstance(value, Tensor):  # detached: the cache must not keep alive what its entries live as long as
            value = value.detach().clone() if value.device.type == "cpu" else value.detach()
        self.value = value

    def is_of(self, value: Any) -> bool:
        """Whether the value is the same; False where only a synchronisation with the GPU could tell."""
        if not isinstance(value, Tensor) or not isinstance(self.value, Tensor):
            return value is self.value or (isinstance(value, float) and value == self.value)
        if getattr(_local, "frozen", False):
            return self.identity is not None and self.identity == _identity(value)
        return value.device.type == "cpu" and value.dtype is self.value.dtype and torch.equal(value, self.value)


class RowsSnapshot(Snapshot):
    """A stack's chosen rows at one time; under `frozen` the whole stack is promised to stay as it is."""

    def __init__(self, stack: Tensor, chosen: Tensor) -> None:
        super().__init__(None)
        self.identity, self.chosen = _identity(stack), chosen
        self.value = stack.detach().index_select(0, chosen)

    def is_of(self, value: Any) -> bool:
        """As `Snapshot.is_of`, of a stack, or of a pair of a stack and the same chosen rows."""
        stack: Tensor = value[0] if isinstance(value, tuple) else value
        if getattr(_local, "frozen", False):
            return self.identity is not None and self.identity == _identity(stack)
        return stack.device.type == "cpu" and torch.equal(stack.detach().index_select(0, self.chosen), self.value)


def _identity(value: Any) -> tuple[Any, ...] | None:
    """Where a tensor's values are, and how often they were written there; inference tensors are not counted."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value.data_ptr(), value._version, value.dtype, value.device, value.numel()


def contract(cores: Tensor, shape: TTShape, dtype: torch.dtype) -> Contraction:
    """The train of `cores [num_params]` and `shape`, contracted in `dtype`; cached while the values are equal."""
    found = _latest.get(cores)
    if found is None or found.shape != shape or found.R.dtype is not dtype or not found.cores.is_of(cores):
        found = _latest[cores] = Contraction(cores, shape, dtype)
    return found


def contract_stack(stack: Tensor, chosen: Tensor, shape: TTShape, dtype: torch.dtype) -> Contraction:
    """As `contract`, of the chosen trains of a stack `[adapters, num_params]`."""
    found = _latest.get(stack)
    if (
        found is None
        or found.shape != shape
        or found.R.dtype is not dtype
        or not isinstance(found.cores, RowsSnapshot)
        or not torch.equal(found.cores.chosen, chosen)
        or not found.cores.is_of(stack)
    ):
        cores = RowsSnapshot(stack, chosen)
        found = _latest[stack] = Contraction(cores.value, shape, dtype, cores)
    return found


class Contraction:
    """L, stored as its transpose `Lt`, and R of a train; of several, with one dimension more, the first."""

    def __init__(self, cores: Tensor, shape: TTShape, dtype: torch.dtype, snapshot: Snapshot | None = None) -> None:
        self.shape, self.cores = shape, snapshot or Snapshot(cores)
        self._derived: dict[str, tuple[list[Snapshot], Any]] = {}
        values = cores.detach().to(dtype, copy=True).contiguous()
        lead, strides = values.shape[:-1], values.stride()[:-1]
        starts, matrices = [0], list[Tensor]()
        for r, n, r_next in shape.core_shapes:
            # One call where split and view would be two: with few rows, calls dominate the time.
            matrices.append(values.as_strided((*lead, r, n * r_next), (*strides, n * r_next, 1), starts[-1]))
            starts.append(starts[-1] + r * n * r_next)
        cut, K = shape.cut, shape.waist
        self._cut = starts[cut]
        self._in_matrices, self._out_matrices = matrices[:cut], matrices[cut:]
        self._in_partials = _partials(self._in_matrices, shape.bond_ranks[1:cut])
        self._out_partials = _partials(self._out_matrices, shape.bond_ranks[cut + 1 : -1])
        in_factor, out_factor = shape.factors
        L = _product(self._in_matrices, self._in_partials, in_factor).view(*lead, shape.in_features, K)
        self.R = _product(self._out_matrices, self._out_partials, out_factor).view(*lead, K, shape.out_features)
        self.Lt = L.mT.contiguous()
        self.L = self.Lt.mT

    def derived(self, name: str, inputs: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What `make` computes from this contraction and the inputs; its latest result where they are the same.

        Of a stack an input is a pair: it, and which of its rows count.
        """
        known = self._derived.get(name)
        if known is None or not all(old.is_of(new) for old, new in zip(known[0], inputs, strict=True)):
            snapshots = [RowsSnapshot(*value) if isinstance(value, tuple) else Snapshot(value) for value in inputs]
            known = self._derived[name] = snapshots, make()
        return known[1]

    def dcores(self, dLt: Tensor, dR: Tensor) -> Tensor:
        """The gradient of the flat cores."""
        grads = torch.cat(
            _core_grads(self._in_matrices, self._in_partials, dLt.mT)
            + _core_grads(self._out_matrices, self._out_partials, dR),
            dim=-1,
        )
        in_factor, out_factor = self.shape.factors
        if in_factor != 1.0:
            grads[..., : self._cut] *= in_factor
        if out_factor != 1.0:
            grads[..., self._cut :] *= out_factor
        return grads


def _partials(matrices: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """The products `[r(0)·n(1)···n(j), r(j)]` of a side's first j cores, for every j short of them all."""
    partials: list[Tensor] = []
    for matrix, rank in zip(matrices, ranks, strict=False):
        partials.append(_rows(_product([matrix], partials), rank))
    return partials


def _product(matrices: Sequence[Tensor], partials: Sequence[Tensor], factor: float = 1.0) -> Tensor:
    """factor times the last partial product times the last core."""
    last = matrices[-1] if factor == 1.0 else matrices[-1] * factor  # far smaller than the product
    return partials[-1] @ last if partials else last


def _core_grads(matrices: Sequence[Tensor], partials: Sequence[Tensor], d: Tensor) -> list[Tensor]:
    """The flat gradients of a side's cores, from that of its product."""
    grads = []
    for matrix, partial in zip(matrices[:0:-1], partials[::-1], strict=True):
        d = _rows(d, matrix.shape[-1])
        grads.append((partial.mT @ d).flatten(-2))
        d = d @ matrix.mT
    grads.append(d.flatten(-2))
    return grads[::-1]


def _rows(matrix: Tensor, columns: int) -> Tensor:
    """The same elements in rows of so many columns."""
    return matrix.reshape(*matrix.shape[:-2], -1, columns)
