"""`loretta finetune` in a process that kills itself with SIGKILL at a numbered moment of its run.

The moments are the ends of the training steps and every change of the output folder: a file opened for writing, a
rename, a removal, a folder made, and the middle of each file that torch or safetensors write.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["loretta.cli.finetune", "tests.resume.killing"])


class Moments:
    """Counts the moments and dies at one of them, given by its number or as the first whose name ends so."""

    def __init__(self, die_at: int | str | None, log: Path) -> None:
        self.die_at, self.log, self.count = die_at, log.open("a"), 0
        self.watching = True

    def pass_one(self, name: str) -> bool:
        """Whether the process is to die now."""
        self.log.write(f"{self.count} {name}\n")
        self.log.flush()
        self.count += 1
        return name.endswith(self.die_at) if isinstance(self.die_at, str) else self.count - 1 == self.die_at

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching or event not in CHANGES:
            return
        path, mode = str(arguments[0]), arguments[1] if len(arguments) > 1 else None
        if event == "open" and not (isinstance(mode, str) and mode[:1] in "wax" and "out" in path):
            return
        self.watching = False
        if self.pass_one(f"{event} {path}"):
            die()
        self.watching = True

    def torn(self, write: Any, file_at: int) -> Any:
        """A function that writes a file, dying when half of it is there where that is the moment."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.watching = False
            result = write(*arguments, **options)
            self.watching = True
            path = Path(arguments[file_at])
            if self.pass_one(f"torn {path}"):
                os.truncate(path, path.stat().st_size // 2)
                die()
            return result

        return wrapped


def die() -> None:
    """The end, without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def finetune(arguments: list[str], die_at: int | str | None, log: Path) -> None:
    """The command, with its words in `log` and its moments in a file beside it."""
    import peft.peft_model
    import torch

    from loretta.__main__ import main
    from loretta.cli.training import Progress

    gc.freeze()  # the Trainer's collections would look at all that the server imported
    torch.set_num_threads(1)
    words = log.open("a")
    os.dup2(words.fileno(), 1)
    os.dup2(words.fileno(), 2)
    moments = Moments(die_at, log.with_suffix(".moments"))
    torch.save = moments.torn(torch.save, 1)
    peft.peft_model.safe_save_file = moments.torn(peft.peft_model.safe_save_file, 1)
    end_step = Progress.on_step_end

    def on_step_end(self: Progress, args: Any, state: Any, control: Any, **options: Any) -> None:
        end_step(self, args, state, control, **options)
        if moments.pass_one(f"step {state.global_step}"):
            die()

    Progress.on_step_end = on_step_end  # type: ignore[method-assign]
    sys.addaudithook(moments.audit)
    sys.exit(main(arguments))


def run(arguments: list[object], log: Path, die_at: int | str | None = None) -> int:
    """Run the command in a fresh process; its exit code, -9 where it was killed."""
    process = server.Process(target=finetune, args=([str(word) for word in arguments], die_at, log))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
