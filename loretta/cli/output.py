"""An output folder that holds the old result or the new one, complete, whenever the process is killed.

Everything is written into the sibling folder `NAME.part`, and swapped in by renaming.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loretta.cli.report import UserError

RECORD = "loretta.json"


class OutputFolder:
    """The exclusive right to write one folder, from entering to leaving.

    `new` is the folder to fill before `publish()`, which adds `logs` to it if there are any; `checkpoints`, `logs` and
    `run_file` stay in place when the process dies. Entering fails where the folder was not written by this command line
    or another process writes it.
    """

    def __init__(self, path: str):
        if "\0" in path:
            raise UserError(f"{path!r}: is not a path; choose another --output")
        self.path = Path(path).expanduser().resolve()
        self.part = self.path.with_name(self.path.name + ".part") if self.path.name else self.path
        self.new = self.part / "new"
        self.replaced = self.part / "replaced"
        self.checkpoints = self.part / "checkpoints"
        self.logs = self.part / "logs"
        self.run_file = self.part / "run.json"
        self.lock = FileLock(self.part / "lock")

    def __enter__(self) -> "OutputFolder":
        _check_replaceable(self.path, RECORD)
        _check_replaceable(self.part, "lock")
        try:
            self.lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(f"{self.part}: another loretta is writing there; wait for it to end") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        if self.replaced.exists() and not self.path.exists():  # died between the two renames
            os.replace(self.replaced, self.path)
        _remove(self.new, self.replaced)
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self.new)
        if not (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            _remove(self.part)
        self.lock.release()

    def publish(self) -> None:
        """Put `new` in the place of the folder, then delete what it replaces and the files of the run."""
        if self.logs.exists():
            os.replace(self.logs, self.new / "logs")
        if self.path.exists():
            os.replace(self.path, self.replaced)
        os.replace(self.new, self.path)
        _remove(self.replaced)
        self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        """Leave nothing to resume: the run finished or failed."""
        _remove(self.checkpoints)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by renaming, so that it is never incomplete."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def size_on_disk(folder: Path, pattern: str = "*") -> int:
    """Bytes of the matching files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def _check_replaceable(folder: Path, mark: str) -> None:
    """Refuse a path that something else uses; a folder of this command line holds the mark."""
    if folder == folder.parent or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder to write to; choose another --output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
        raise UserError(f"{folder}: is in use by something else (it has no {mark}); choose another --output")
