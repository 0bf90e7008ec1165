"""A model with a store generates for each row what its adapter makes of the base, whatever was in the places before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loretta import AdapterStore
from loretta.serve.adapters import StoreModel
from loretta.store import Damaged
from tests.store.adapters import save_adapter, variant
from tests.tiny_models import tiny_model

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rep": ("rep", {}),
    "rep-slices": ("rep", {"target_modules": ["q_proj"], "enable_lora": [True, False]}),
    "adp-with-norms": ("adp", {"train_layernorm": True}),
    "adp-learned-scale": ("adp", {"scaling": "learned", "non_linearity": "gelu"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_adapter(kind: str, tmp_path: Path) -> None:
    method, fields = KINDS[kind]
    first = save_adapter(tmp_path / "a", method, **fields)
    folders = {"a": first} | {name: variant(tmp_path / name, first, seed) for seed, name in enumerate("bcde")}
    store = AdapterStore.create(tmp_path / "store", like=first)
    store.add(folders)
    served = StoreModel(tiny_model("llama"), store, 3)
    ids = torch.randint(3, 60, (4, 7))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    answers = {}
    for names in (["a", None, "b", "a"], ["d", "c", "b", None], ["a", "b", "c", "c"], [None] * 4, ["e"] * 4):
        assert served.fetch(names) == {}
        made = served.generate(names, input_ids=ids, **options)
        for row, name in enumerate(names):
            alone = PeftModel.from_pretrained(tiny_model("llama"), folders[name or "a"]).eval()
            alone = alone.unload() if name is None else alone
            one = options | {"attention_mask": options["attention_mask"][:1]}
            answers[name, row] = alone.generate(input_ids=ids[row : row + 1], **one)[0].tolist()
            assert made[row, : len(answers[name, row])].tolist() == answers[name, row], (names, row)
    assert len({tuple(answer) for answer in answers.values()}) > 10


def test_those_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    first = save_adapter(tmp_path / "a")
    store = AdapterStore.create(tmp_path / "store", like=first)
    store.add({"a": first, "b": first})
    served = StoreModel(tiny_model("llama"), store, 2)
    with open(store.folder / "rows-0.bin", "r+b") as file:
        file.write(b"x")
    refused = served.fetch([None, "a", "b", "c"])
    assert {name: type(error) for name, error in refused.items()} == {"a": Damaged, "c": KeyError}


def test_a_model_of_other_shapes_is_refused(tmp_path: Path) -> None:
    first = save_adapter(tmp_path / "a")
    store = AdapterStore.create(tmp_path / "store", like=first)
    with pytest.raises(ValueError, match="the store's adapters do not fit this model"):
        StoreModel(tiny_model("llama", num_hidden_layers=3), store, 2)
    with pytest.raises(ValueError, match="the store's adapters do not fit this model"):
        StoreModel(tiny_model("llama", num_hidden_layers=1), store, 2)
