"""Which checkpoint a run may be resumed from, and whether it is the same run."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from loretta.cli.output import OutputFolder, write_json
from loretta.cli.report import UserError, log

SEAL = "complete.json"


def seal(checkpoint: Path) -> None:
    """Record that a checkpoint is complete: every file in it and its size, written after all others.

    transformers writes trainer_state.json last, but in a run of several processes only process 0 does so, and a file's
    name does not tell whether it is truncated.
    """
    write_json(checkpoint / SEAL, _sizes(checkpoint))


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None; incomplete ones are named and removed."""
    complete = {}
    for path in sorted(folder.glob("checkpoint-*")):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step is None:
            continue
        if problem := _incomplete(path):
            log(f"{path}: is not complete ({problem}); it is not used")
            shutil.rmtree(path)
        else:
            complete[int(step[1])] = path
    return complete[max(complete)] if complete else None


def _incomplete(checkpoint: Path) -> str | None:
    """Which files of a checkpoint are missing or changed; None if it is as it was sealed."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its writing was cut short"
    sizes = _sizes(checkpoint)
    wrong = [name for name in sealed if sealed[name] != sizes.get(name)]
    return ", ".join(f"{name} {'of another size' if name in sizes else 'missing'}" for name in wrong) or None


def _sizes(folder: Path) -> dict[str, int]:
    """The size of every file in a folder, by its path in there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def start_or_resume(output: OutputFolder, settings: dict[str, Any], resume: bool) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to resume from (None: from the start), and the content of the run's file.

    A new run must not delete an unfinished one, and a resumed one must have its settings.
    """
    checkpoint = newest_complete(output.checkpoints)
    if not resume:
        if checkpoint is not None:
            raise UserError(
                f"{output.part}: holds an unfinished run ({checkpoint.name}); continue it with --resume, "
                "or delete that folder to start over"
            )
        shutil.rmtree(output.logs, ignore_errors=True)
        return None, {"settings": settings}
    if checkpoint is None and not output.run_file.exists():
        reason = "the run there is finished" if output.path.exists() else "no complete checkpoint there"
        raise UserError(f"{output.path}: nothing to resume: {reason}")
    try:
        run = json.loads(output.run_file.read_text(encoding="utf-8"))
        before = run["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output.run_file}: cannot be read, so the run cannot be resumed") from error
    changed = [name for name in sorted(before.keys() | settings.keys()) if before.get(name) != settings.get(name)]
    if changed:
        shown = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise UserError(f"{output.path}: --resume needs the settings of the run it continues: {shown}")
    log(f"resuming from {checkpoint.name}" if checkpoint else "no complete checkpoint: starting from step 0")
    return checkpoint, run


def fingerprint(path: str) -> str:
    """A short hash of a file's content, so that a changed file is noticed; a hub id stands for itself."""
    file = Path(path).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else path
