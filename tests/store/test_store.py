"""A store gives back what was added, refuses what does not fit, and outlives damage, deaths and other processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from loretta import AdapterStore, get_peft_model
from loretta import store as store_module
from loretta.store import Damaged
from tests.store.adapters import WEIGHTS, save_adapter, variant
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
NAMES = "abcdefgh"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Eight adapters of one configuration by their names."""
    parent = tmp_path_factory.mktemp("adapters")
    first = save_adapter(parent / "a")
    return {"a": first} | {name: variant(parent / name, first, seed) for seed, name in enumerate(NAMES[1:])}


@pytest.fixture
def store(tmp_path, folders) -> AdapterStore:
    """A store of the first six."""
    made = AdapterStore.create(tmp_path / "store", like=folders["a"])
    made.add({name: folders[name] for name in NAMES[:6]})
    return made


def expect(store: AdapterStore, folders: dict[str, Path], names: str) -> None:
    """The store, as another reader opens it, has these adapters with the numbers of their folders."""
    opened = AdapterStore(store.folder)
    assert "".join(opened) == names
    for name in names:
        expected = load_file(folders[name] / WEIGHTS)
        found = opened.load(name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_gives_back_what_was_added(store, folders) -> None:
    expect(store, folders, "abcdef")
    assert (len(store), "c" in store, "x" in store, store.dtype) == (6, True, False, torch.float32)
    assert store.nbytes == (store.folder / "rows-0.bin").stat().st_size
    assert store.config["base_model_name_or_path"] == "some/llama"
    with pytest.raises(KeyError, match="there is no adapter x"):
        store.load("x")


def test_what_it_loads_is_an_adapter_of_peft(store, folders) -> None:
    config = peft.PeftConfig.from_pretrained(folders["a"])
    model = get_peft_model(tiny_model("llama"), config)
    peft.set_peft_model_state_dict(model, store.load("c"))
    read = peft.PeftModel.from_pretrained(tiny_model("llama"), folders["c"])
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model.eval()(ids).logits, read(ids).logits)


@pytest.mark.parametrize("kind", ["rep", "adp", "adp-learned", "norms"])
def test_stacks_in_the_order_of_the_names(kind, tmp_path) -> None:
    fields = {"adp-learned": {"scaling": "learned"}, "norms": {"train_layernorm": True}}.get(kind, {})
    first = save_adapter(tmp_path / "a", "adp" if kind.startswith("adp") else "rep", **fields)
    folders = {"a": first, "b": variant(tmp_path / "b", first, 1)}
    store = AdapterStore.create(tmp_path / "store", like=first)
    store.add(folders)
    tensors = {name: load_file(folder / WEIGHTS) for name, folder in folders.items()}
    assert any("norm" in key for key in tensors["a"]) == (kind == "norms")
    for dtype in (None, torch.bfloat16):
        stacked = store.stack(["b", "a", "b"], dtype=dtype)
        assert stacked.keys() == tensors["a"].keys()
        for key, tensor in stacked.items():
            assert tensor.is_contiguous()
            assert torch.equal(tensor, torch.stack([tensors[name][key] for name in "bab"]).to(dtype or torch.float32))


def rewritten(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Damage to an adapter's folder: its tensors after a change."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def torn(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def configured(**fields: object) -> Callable[[Path], None]:
    """Damage to an adapter's folder: other fields of its configuration."""

    def damage(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def first(tensors: dict) -> str:
    return sorted(tensors)[0]


REFUSED = {
    "torn": (torn, "adapter_model.safetensors: cannot be read"),
    "no-weights": (without_weights, "no adapter there .no adapter_model.safetensors."),
    "another-shape": (
        rewritten(lambda tensors: tensors.update({first(tensors): torch.ones(7)})),
        r"q_proj.loretta_rep_A.cores is \[7\] in torch.float32, where the store has \[260\]",
    ),
    "another-dtype": (
        rewritten(lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].half()})),
        r"\[260\] in torch.float16",
    ),
    "a-tensor-missing": (rewritten(lambda tensors: tensors.pop(first(tensors))), "lacks base_model.*rep_A.cores"),
    "a-tensor-more": (
        rewritten(lambda tensors: tensors.update({first(tensors).replace("layers.0", "layers.7"): torch.ones(2)})),
        "has base_model.*layers.7",
    ),
    "no-train": (
        rewritten(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "holds base_model.model.lm_head.weight; a store takes tensor trains and trained norms, nothing else",
    ),
    "not-finite": (rewritten(lambda tensors: tensors[first(tensors)].fill_(torch.nan)), "not finite"),
    "another-base": (
        configured(base_model_name_or_path="other/llama"),
        "has base_model_name_or_path 'other/llama', where the store has 'some/llama'",
    ),
    "another-configuration": (configured(lora_alpha=32), "has lora_alpha 32, where the store has 16"),
    "another-method": (configured(peft_type="LORA"), "a store takes LoRETTA adapters, not 'LORA'"),
    "norms-where-others-have-none": (configured(modules_to_save=["norm"]), r"has modules_to_save \['norm'\], where"),
    "biases": (configured(bias="lora_only"), "holds biases of the base"),
    "broken-configuration": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_an_adapter_and_adds_none_of_its_call(damage, message, store, folders, tmp_path) -> None:
    damage(variant(tmp_path / "wrong", folders["a"], 9))
    with pytest.raises((ValueError, OSError), match=message):
        store.add({"g": folders["g"], "wrong": tmp_path / "wrong", "h": folders["h"]})
    expect(store, folders, "abcdef")
    store.add({"g": folders["g"]})
    expect(store, folders, "abcdefg")


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("rep", {"modules_to_save": ["lm_head"]}, "holds base_model.model.lm_head.weight; a store takes"),
        ("rep", {"bias": "all"}, "holds biases of the base"),
        ("adp", {"tensorized": False}, "its projections are dense"),
    ],
)
def test_makes_no_store_of_what_it_cannot_hold(method, fields, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterStore.create(tmp_path / "store", like=save_adapter(tmp_path / "a", method, **fields))
    assert not (tmp_path / "store").exists()


def test_makes_no_store_where_something_else_is(tmp_path, folders) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is in use"):
        AdapterStore.create(tmp_path, like=folders["a"])
    with pytest.raises(FileNotFoundError, match="no adapter store there"):
        AdapterStore(tmp_path)


def test_the_order_of_names_and_the_dropout_in_a_configuration_do_not_count(store, folders, tmp_path) -> None:
    variant(tmp_path / "g", folders["g"], 6)
    names = json.loads((folders["a"] / "adapter_config.json").read_text())["target_modules"]
    configured(target_modules=names[::-1], lora_dropout=0.5, peft_version="9")(tmp_path / "g")
    store.add({"g": tmp_path / "g"})
    assert "g" in store


def test_a_name_is_replaced_only_when_asked(store, folders) -> None:
    with pytest.raises(ValueError, match="b: there is an adapter of that name already"):
        store.add({"b": folders["g"]})
    before = store.load("b")
    store.add({"b": folders["g"]}, replacing=True)
    assert not any(torch.equal(before[key], tensor) for key, tensor in store.load("b").items())
    expect(store, folders | {"b": folders["g"]}, "abcdef")
    for name in ("", "a\nb"):
        with pytest.raises(ValueError, match="cannot be the name of an adapter"):
            store.add({name: folders["g"]})


def test_gives_the_place_of_removed_adapters_back(store, folders) -> None:
    size = store.nbytes // 6
    with pytest.raises(ValueError, match="there is no adapter x"):
        store.remove(["a", "x"])
    for number, name in enumerate(NAMES[:6], 1):
        store.remove([name])
        left = NAMES[number:6]
        expect(store, folders, left)
        on_disk = sum(path.stat().st_size for path in store.folder.glob("rows-*.bin"))
        assert on_disk <= 1.2 * len(left) * size
    store.add({"h": folders["h"]})
    expect(store, folders, "h")


def test_an_old_reader_goes_on_while_rows_move(store, folders) -> None:
    reader = AdapterStore(store.folder)
    store.remove("abcd")
    assert not (store.folder / "rows-0.bin").exists()
    assert torch.equal(
        *(next(iter(tensors.values())) for tensors in (reader.load("b"), load_file(folders["b"] / WEIGHTS)))
    )
    reader.refresh()
    assert list(reader) == ["e", "f"]


@pytest.mark.parametrize("damage", ["a-flipped-bit", "cut-off", "no-file"])
def test_damage_costs_the_adapters_that_it_hit(damage, store, folders) -> None:
    file = store.folder / "rows-0.bin"
    content = bytearray(file.read_bytes())
    size = len(content) // 6
    if damage == "a-flipped-bit":
        content[4 * size + 5] ^= 1
        file.write_bytes(content)
    elif damage == "cut-off":
        file.write_bytes(content[: 4 * size + 5])
    else:
        file.unlink()
    hit = {"a-flipped-bit": "e", "cut-off": "ef", "no-file": "abcdef"}[damage]
    opened = AdapterStore(store.folder)
    assert "".join(opened.verify()) == hit
    with pytest.raises(ValueError, match=f"the numbers of {hit[0]} are damaged"):
        opened.load(hit[0])
    opened.add({"g": folders["g"]})
    opened.remove(hit)
    expect(store, folders, "".join(name for name in "abcdefg" if name not in hit))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_those_used_last_stay_in_their_places(dtype, store, folders) -> None:
    places = store.places(3, dtype=dtype)
    expected = {name: load_file(folders[name] / WEIGHTS) for name in NAMES}

    def fetch(names: str) -> list[int]:
        found = [places.fetch(name) for name in names]
        for name, place in zip(names, found, strict=True):
            for key, stacked in places.tensors.items():
                assert torch.equal(stacked[place], expected[name][key].to(dtype or torch.float32))
        return found

    assert sorted(fetch("abc")) == [0, 1, 2]
    a, b, c = fetch("abc")
    assert fetch("acd") == [a, c, b]  # b was not used for longest
    with open(store.folder / "rows-0.bin", "r+b") as file:
        file.write(bytes(store.nbytes))
    assert fetch("acd") == [a, c, b]  # what is in its place is not read again
    with pytest.raises(Damaged):
        places.fetch("b")
    store.remove(["c"])
    with pytest.raises(KeyError):
        places.fetch("c")
    store.add({"a": folders["g"]}, replacing=True)
    expected["a"] = expected["g"]
    fetch("a")


def test_one_process_writes_at_a_time(store, folders) -> None:
    with FileLock(store.folder / "lock"), pytest.raises(BlockingIOError, match="another process is writing there"):
        store.add({"g": folders["g"]})
    store.add({"g": folders["g"]})
    expect(store, folders, "abcdefg")


DYING = """
import os, signal, sys
from loretta import AdapterStore
store, moment = AdapterStore(sys.argv[1]), sys.argv[2]
tensors = store.load("a")

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def adapters():
    for number in range(50):
        yield f"new-{number}", tensors
    if moment == "amid-the-rows":
        die()

if moment == "before-the-index":
    import loretta.store as module
    module.write_json = die
elif moment == "amid-the-index":
    os.replace = die
elif moment == "before-the-old-rows-go":
    import pathlib
    pathlib.Path.unlink = die
if moment == "before-the-old-rows-go":
    store.remove("abcd")
store.add_tensors(adapters())
"""


@pytest.mark.parametrize("moment", ["amid-the-rows", "before-the-index", "amid-the-index", "before-the-old-rows-go"])
def test_opens_with_all_earlier_adapters_after_a_writer_was_killed(moment, store, folders) -> None:
    done = subprocess.run([sys.executable, "-c", DYING, store.folder, moment], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    left = "ef" if moment == "before-the-old-rows-go" else "abcdef"
    assert sum(path.stat().st_size for path in store.folder.glob("rows-*.bin")) > len(left) * store.nbytes // 6
    expect(store, folders, left)
    store.refresh()
    store.add({"g": folders["g"]})
    expect(store, folders, left + "g")
    assert sum(path.stat().st_size for path in store.folder.glob("rows-*.bin")) == AdapterStore(store.folder).nbytes


READING = """
import sys, torch
from loretta import AdapterStore
store, reads = AdapterStore(sys.argv[1]), 0
print("ready", flush=True)
seen = set()
while "end" not in store:
    store.refresh()
    for name in list(store):
        if name in store:
            (value,) = set(torch.cat([tensor.flatten() for tensor in store.load(name).values()]).tolist())
            assert name == "end" or value == float(name), (name, value)
            seen.add(name)
print(len(seen))
"""


def test_readers_see_whole_adapters_while_one_process_writes(store) -> None:
    shapes = store.shapes
    store.remove(list(store))
    store.add_tensors([("0", {key: torch.zeros(shape) for key, shape in shapes.items()})])
    command = [sys.executable, "-c", READING, store.folder]
    readers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for number in range(1, 150):
        store.add_tensors([(str(number), {key: torch.full(shape, float(number)) for key, shape in shapes.items()})])
        if number > 5:
            store.remove([str(number - 5)])
    store.add_tensors([("end", {key: torch.ones(shape) for key, shape in shapes.items()})])
    for reader in readers:
        seen = reader.communicate(timeout=60)[0]
        assert reader.returncode == 0
        assert int(seen) > 5


@pytest.mark.parametrize("names", ["abcd", "a"])
def test_a_reader_that_a_writer_overtakes_reads_again(names, store, folders, monkeypatch) -> None:
    writer, mapped = AdapterStore(store.folder), store_module._mapped

    def overtaken(file: Path) -> object:
        monkeypatch.setattr(store_module, "_mapped", mapped)
        writer.remove(names)  # of four the file of rows is another one then
        writer.add({"h": folders["h"]})
        return mapped(file)

    monkeypatch.setattr(store_module, "_mapped", overtaken)
    reader = AdapterStore(store.folder)
    assert "h" in reader
    assert reader.verify() == []


def test_a_broken_index_is_named(store) -> None:
    (store.folder / "index.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match=r"index.json: cannot be read as the index"):
        AdapterStore(store.folder)
    (store.folder / "index.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="its format is 2"):
        AdapterStore(store.folder)
