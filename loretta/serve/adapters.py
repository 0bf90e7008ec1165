"""A base model in whose batches every row has an adapter of a store, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from torch import nn

from loretta import AdapterStore, get_peft_model
from loretta.store import Damaged


class StoreModel:
    """A base model with as many places for adapters as a batch may need, filled from a store for each batch.

    Args:
        base: the model, in eval mode.
        store: of adapters that were trained on it.
        places: the most adapters that one batch names.

    Raises:
        ValueError: the store's adapters do not fit the model.
    """

    def __init__(self, base: nn.Module, store: AdapterStore, places: int) -> None:
        self.store = store
        self._places = [f"place-{number}" for number in range(places)]
        self._of: dict[str, str] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the base's name, which is compared by who serves
            for place in self._places:
                config = PeftConfig.from_peft_type(**store.config | {"inference_mode": True})
                if place == self._places[0]:
                    self.model = get_peft_model(base, config, place).eval()
                else:
                    self.model.add_adapter(place, config)
            held = get_peft_model_state_dict(self.model, adapter_name=self._places[0])
        if {key: tuple(tensor.shape) for key, tensor in held.items()} != store.shapes:
            raise ValueError(f"{store.folder}: its adapters do not fit this model")

    @torch.no_grad()
    def place(self, names: Iterable[str | None]) -> dict[str | None, Exception]:
        """Put the adapters of a batch into places, for `generate`.

        Args:
            names: of the adapters, at most as many as there are places; None is the base alone.

        Returns:
            those that cannot be used: KeyError where the store does not have one, Damaged where its numbers are.
        """
        refused: dict[str | None, Exception] = {}
        self._of = {}
        for name, place in zip(dict.fromkeys(name for name in names if name is not None), self._places, strict=False):
            try:
                layers = self.store.stack([name], self.model.device)
            except (KeyError, Damaged) as error:
                refused[name] = error
                continue
            self._of[name] = place
            for layer, parts in layers.items():
                module = self.model.base_model.model.get_submodule(layer)
                for part, stacked in parts.items():
                    kind, _, number = part.partition(".")
                    getattr(module, kind)[place].get_parameter(number).copy_(stacked[0])
        return refused

    def generate(self, names: Sequence[str | None], **options: Any) -> Any:
        """`generate` of transformers, each row with the placed adapter of that name, None for the base alone."""
        if not any(names):
            with self.model.disable_adapter():
                return self.model.generate(**options)
        places = ["__base__" if name is None else self._of[name] for name in names]
        return self.model.generate(**options, adapter_names=places)
