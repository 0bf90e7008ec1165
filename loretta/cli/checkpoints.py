"""Which checkpoint a run may go on from, and whether it is the same run."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from loretta.cli.errors import UserError
from loretta.cli.output import OutputFolder

STATE_FILE = "trainer_state.json"  # transformers writes it last
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None; those that lack a file are of no use and removed."""
    steps = {}
    for path in folder.glob("checkpoint-*"):
        if _is_complete(path):
            steps[int(path.name.removeprefix("checkpoint-"))] = path
        else:
            shutil.rmtree(path)
    return steps[max(steps)] if steps else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in FILES)


def start_or_resume(output: OutputFolder, settings: dict[str, Any], resume: bool) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from (None: a new run), and what the run's file says.

    Raises:
        UserError: for --resume with nothing to go on from or with other settings, and for a new run where an
            unfinished one would be lost.
    """
    checkpoint = newest_complete(output.checkpoints)
    if not resume:
        if checkpoint is not None:
            raise UserError(
                f"{output.part}: holds an unfinished run ({checkpoint.name}); continue it with --resume, "
                "or delete that folder to start over"
            )
        return None, {"settings": settings}
    if checkpoint is None:
        finished = "the run there is finished" if output.path.exists() else "no complete checkpoint there"
        raise UserError(f"{output.path}: nothing to resume: {finished}")
    try:
        run = json.loads(output.run_file.read_text(encoding="utf-8"))
        before = run["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output.run_file}: cannot be read, so the run cannot be resumed") from error
    changed = [name for name in sorted(before.keys() | settings.keys()) if before.get(name) != settings.get(name)]
    if changed:
        shown = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise UserError(f"{output.path}: --resume needs the settings of the run it continues: {shown}")
    return checkpoint, run


def fingerprint(path: str) -> str:
    """A file's content as a short hash, so that a changed file is noticed; a hub id stands for itself."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else path
