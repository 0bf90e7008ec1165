"""An output folder that is either the old good one or the new good one, whatever kills the process.

Everything is written into the sibling folder `NAME.part`, and swapped in by renaming.
"""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from loretta.cli.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: runs that write the same folder at once are not told apart there
    fcntl = None  # type: ignore[assignment]

RECORD = "loretta.json"


class OutputFolder:
    """Holds the right to write one folder, from entering to leaving.

    `new` is the folder to fill before `publish()`, which adds `logs` to it if there are any; `checkpoints`, `logs` and
    `run_file` stay in place when the process dies.

    Raises:
        UserError: on entering, where the folder is not ours to replace or another process is at it.
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
        self._lock: IO[str] | None = None

    def __enter__(self) -> "OutputFolder":
        _check_ours(self.path, RECORD)
        _check_ours(self.part, "lock")
        try:
            self._lock = _locked(self.part / "lock")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        if self.replaced.exists() and not self.path.exists():  # died between the two renames
            os.replace(self.replaced, self.path)
        self._clear(self.new, self.replaced)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear(self.new)
        if not (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            self._clear(self.part)
        if self._lock is not None:
            self._lock.close()

    def publish(self) -> None:
        """Put `new` in the place of the folder, then drop what it replaces and every trace of the run."""
        if self.logs.exists():
            os.replace(self.logs, self.new / "logs")
        if self.path.exists():
            os.replace(self.path, self.replaced)
        os.replace(self.new, self.path)
        self._clear(self.replaced)
        self.drop_checkpoints()

    def drop_checkpoints(self) -> None:
        """The run finished or failed: there is nothing to go on from."""
        self._clear(self.checkpoints)

    def _clear(self, *folders: Path) -> None:
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once: there is never half of it."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def size_on_disk(folder: Path, pattern: str = "*") -> int:
    """Bytes of the matching files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def _check_ours(folder: Path, mark: str) -> None:
    """Refuse a path that something else uses; what we wrote holds the mark."""
    if folder == folder.parent or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder to write to; choose another --output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
        raise UserError(f"{folder}: is in use by something else (it has no {mark}); choose another --output")


def _locked(path: Path) -> IO[str]:
    """Create and lock a file, which also makes its folder; the lock goes with the process."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
        if fcntl is None:
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(f"{path.parent}: another loretta is writing there; wait for it to end") from error
        if path.exists() and os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
        lock.close()  # its former holder removed it in between
