"""The adapters of a store that are on a device."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .store import AdapterStore


class Places:
    """Room for some adapters of a store on a device: those that were asked for last. Made by ``AdapterStore.places``.

    One thread at a time may use it.

    Attributes:
        tensors: stacked, as ``AdapterStack`` takes them; of a place that was never filled zeros.
    """

    def __init__(self, store: AdapterStore, count: int, device: torch.device | str, dtype: torch.dtype) -> None:
        if count < 1:
            raise ValueError(f"the number of places must be at least 1, got {count}")
        self._store = store
        shapes = store.shapes.items()
        self.tensors = {key: torch.zeros(count, *shape, device=device, dtype=dtype) for key, shape in shapes}
        self._device = device
        self._of: OrderedDict[Any, int] = OrderedDict((place, place) for place in range(count))  # last used last

    def fetch(self, name: str) -> int:
        """The place of an adapter, where it stays until as many others as there are places were asked for.

        Raises:
            KeyError, Damaged: as ``AdapterStore.load``.
        """
        identity, numbers = self._store._row(name, self._of)
        if identity not in self._of:
            _, place = self._of.popitem(last=False)
            parts = self._store._split(numbers.to(self._device))  # one copy to the device
            torch._foreach_copy_([stacked[place] for stacked in self.tensors.values()], parts)
            self._of[identity] = place
        self._of.move_to_end(identity)
        return self._of[identity]
