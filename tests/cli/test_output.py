"""The output folder is the old good one or the new good one, and nothing of anybody else's is touched."""

import os
from pathlib import Path

import pytest

from loretta.cli import output as output_module
from loretta.cli.output import RECORD, OutputFolder
from loretta.cli.report import UserError


def fill(folder: Path, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text("{}")
    (folder / "weights").write_text(content)


def weights(folder: Path) -> str:
    return (folder / "weights").read_text()


def test_publishes_and_leaves_nothing_else(tmp_path) -> None:
    for content in ("old", "new"):
        with OutputFolder(str(tmp_path / "deep" / "a")) as output:
            fill(output.new, content)
            output.publish()
        assert weights(output.path) == content
        assert os.listdir(tmp_path / "deep") == ["a"]


def test_a_failure_keeps_the_old_folder(tmp_path) -> None:
    fill(tmp_path / "a", "old")

    def fail() -> None:
        with OutputFolder(str(tmp_path / "a")) as output:
            fill(output.new, "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert weights(tmp_path / "a") == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("dies_at", [1, 2], ids=["before-the-old-is-moved", "between-the-two-renames"])
def test_a_process_killed_in_the_swap_loses_nothing(tmp_path, dies_at, monkeypatch) -> None:
    fill(tmp_path / "a", "old")
    output = OutputFolder(str(tmp_path / "a")).__enter__()
    fill(output.new, "new")
    calls = []

    def dying_replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == dies_at:
            raise SystemError("killed")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(output_module.os, "replace", dying_replace)
        with pytest.raises(SystemError):
            output.publish()
    output.lock.release()  # what the system does for a killed process
    with OutputFolder(str(tmp_path / "a")) as output:
        assert weights(output.path) == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_checkpoints_outlive_the_process_until_published(tmp_path) -> None:
    with OutputFolder(str(tmp_path / "a")) as output:
        (output.checkpoints / "checkpoint-1").mkdir(parents=True)
    with OutputFolder(str(tmp_path / "a")) as output:
        assert output.checkpoints.is_dir()
        fill(output.new, "new")
        output.publish()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a", "a.part"])
def test_refuses_a_folder_of_somebody_else(tmp_path, name) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=f"{name}: is in use by something else"), OutputFolder(str(tmp_path / "a")):
        pass
    assert (tmp_path / name / "thesis.tex").exists()


@pytest.mark.parametrize("path", ["file", "file/below", "/"])
def test_refuses_what_is_no_folder(tmp_path, path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"is not a folder to write to|cannot be written"),
        OutputFolder(str(tmp_path / path)),
    ):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_refuses_a_folder_that_another_run_writes(tmp_path) -> None:
    path = str(tmp_path / "a")
    with OutputFolder(path), pytest.raises(UserError, match="another loretta is writing there"), OutputFolder(path):
        pass
    with OutputFolder(path):
        pass
