"""A base model in whose batches every row has an adapter of a store, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from loretta import AdapterStack, AdapterStore, get_peft_model
from loretta.store import Damaged
from loretta_kernels import frozen


class StoreModel:
    """A base model with places for adapters on its device, which are fetched from a store as batches need them.

    Args:
        base: the model, in eval mode.
        store: of adapters that were trained on it.
        places: adapters that stay on the device; as many as one batch names, or more.

    Raises:
        ValueError: the store's adapters do not fit the model.
    """

    def __init__(self, base: nn.Module, store: AdapterStore, places: int) -> None:
        self.store = store
        config = PeftConfig.from_peft_type(**store.config | {"inference_mode": True})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the base's name, which may be another path to the same model
            self.model = get_peft_model(base, config).eval()
        self._places = store.places(places, self.model.device)
        try:
            self._stack = AdapterStack(self.model, self._places.tensors)
        except ValueError as error:
            raise ValueError(f"the store's adapters do not fit this model: {error}") from error
        self._of: dict[str | None, int] = {}

    def fetch(self, names: Iterable[str | None]) -> dict[str | None, Exception]:
        """Have the adapters of a batch on the device, for `generate`.

        Args:
            names: of the adapters, at most as many as there are places; None is the base alone.

        Returns:
            those that cannot be used: KeyError where the store does not have one, Damaged where its numbers are.
        """
        self._of = {None: -1}
        refused: dict[str | None, Exception] = {}
        for name in names:
            try:
                if name is not None:
                    self._of[name] = self._places.fetch(name)
            except (KeyError, Damaged) as error:
                refused[name] = error
        return refused

    def generate(self, names: Sequence[str | None], **options: Any) -> Any:
        """`generate` of transformers, each row with the adapter of that name, which was fetched, or None."""
        with self._stack.serving(torch.tensor([self._of[name] for name in names])), frozen():
            return self.model.generate(**options)
