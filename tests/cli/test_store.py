"""`loretta store`: what it did is printed, what it refuses is one line, and a refused store is not left behind."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from loretta import AdapterStore
from tests.cli.test_main import expect_one_line
from tests.store.adapters import WEIGHTS, save_adapter, variant


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """Three adapters, a fourth with norms, and something else."""
    monkeypatch.chdir(tmp_path)
    first = save_adapter(tmp_path / "runs" / "anna")
    for number, name in enumerate(["ben", "carla"]):
        variant(tmp_path / "runs" / name, first, number)
    save_adapter(tmp_path / "runs" / "head", modules_to_save=["lm_head"])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    return tmp_path


def test_adds_lists_removes_and_verifies(loretta, workplace, capsys) -> None:
    ran = loretta("store", "add", "shop", "runs/anna", "runs/ben/", "c=runs/carla", "--json")
    assert (ran.code, ran.result()["adapters"], ran.result()["method"]) == (0, 3, "rep")
    listed = loretta("store", "list", "shop")
    assert listed.out.splitlines()[-3:] == ["anna", "ben", "c"]
    assert "some/llama" in listed.out
    assert loretta("store", "list", "shop", "--json").result()["names"] == ["anna", "ben", "c"]

    assert loretta("store", "add", "shop", "anna=runs/carla", "--replace").code == 0
    found, expected = AdapterStore("shop").load("anna"), load_file("runs/carla/" + WEIGHTS)
    assert all((found[key] == expected[key]).all() for key in expected)
    assert loretta("store", "remove", "shop", "ben", "--json").result()["adapters"] == 2
    assert loretta("store", "verify", "shop", "--json").result()["damaged"] == []

    (rows,) = Path("shop").glob("rows-*.bin")
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="1"):
        loretta("store", "verify", "shop")
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: ")]) == 1


WRONG = {
    "no-adapter": (["add", "shop", "runs/anna", "runs/none"], "runs/none: no adapter there (no adapter_config.json)"),
    "a-head": (["add", "shop", "runs/head"], "a store takes tensor trains and trained norms, nothing else"),
    "one-name-twice": (["add", "shop", "runs/anna", "anna=runs/ben"], "two adapters would be called anna"),
    "in-use": (["add", "thesis", "runs/anna"], "thesis: is in use"),
    "nothing-to-add": (["add", "shop"], "add STORE takes folders of adapters"),
    "nothing-to-remove": (["remove", "shop"], "remove STORE takes names of adapters"),
    "too-much-to-list": (["list", "shop", "anna"], "list STORE takes nothing else"),
    "replace-of-nothing": (["verify", "shop", "--replace"], "--replace belongs to add"),
    "no-store": (["list", "shop"], "shop: no adapter store there"),
    "unknown-action": (["drop", "shop"], "invalid choice: 'drop'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_refuses_in_one_line_and_leaves_nothing(loretta, workplace, arguments, message) -> None:
    before = sorted(workplace.rglob("*"))
    expect_one_line(loretta("store", *arguments), " store", message)
    assert sorted(workplace.rglob("*")) == before


def test_a_refusal_leaves_the_store_as_it_was(loretta, workplace) -> None:
    loretta("store", "add", "shop", "runs/anna")
    expect_one_line(
        loretta("store", "add", "shop", "runs/ben", "runs/anna"), " store", "an adapter of that name already"
    )
    expect_one_line(loretta("store", "remove", "shop", "anna", "zoe"), " store", "there is no adapter zoe")
    assert loretta("store", "list", "shop", "--json").result()["names"] == ["anna"]
