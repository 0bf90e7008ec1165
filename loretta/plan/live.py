"""What a training step keeps in memory: counted on storages, alike for real tensors and for fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes:
    """Counts the storages that autograd saves for backward, each once, those in `own` not at all.

    `pack` is the hook for `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._saved.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return tensor

    def total(self) -> int:
        """Bytes of the storages that are still alive: a weak reference keeps an address from being used again."""
        return sum(size for reference, size in self._saved.values() if not reference.expired())


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make from birth to death, those in `own` not at all.

    What an operator allocates and frees inside is not seen.

    Attributes:
        phase: where the step is; set it to a later number to begin a phase.
        peaks: by phase, the most that was alive at once, gradients counted at `grad_share` of their size.
    """

    def __init__(self, own: Iterable[Tensor], grad_share: float = 1.0) -> None:
        super().__init__()
        self.grad_share = grad_share
        self.peaks: dict[int, float] = {0: 0.0}
        self._phase = 0
        self._live = 0.0
        self._sizes: dict[int, float] = {}
        self._references: dict[int, weakref.ref] = {}
        self._own = {tensor.untyped_storage()._cdata for tensor in own}

    @property
    def phase(self) -> int:
        return self._phase

    @phase.setter
    def phase(self, phase: int) -> None:
        self._phase = max(self._phase, phase)
        self._note()

    def gradient_is_complete(self, parameter: Tensor) -> None:
        """A hook for `register_post_accumulate_grad_hook`: from here on the gradient counts at its share."""
        storage = parameter.grad.untyped_storage() if parameter.grad is not None else None
        if storage is not None and storage._cdata in self._sizes:
            before, now = self._sizes[storage._cdata], storage.nbytes() * self.grad_share
            self._sizes[storage._cdata] = now
            self._live += now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self._note()
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._own or key in self._sizes:
            return

        def died(_: Any) -> None:
            self._live -= self._sizes.pop(key)
            del self._references[key]

        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, died)
        self._live += storage.nbytes()

    def _note(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0.0), self._live)
