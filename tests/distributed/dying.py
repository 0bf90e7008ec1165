"""The command line in one of several processes, the first of which kills itself at the end of the step DIE_AT."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from loretta.__main__ import main
from loretta.cli.distributed import engine
from loretta.cli.training import Progress

end_step = Progress.on_step_end


def end_or_die(self: Progress, args: Any, state: Any, control: Any, **options: Any) -> None:
    end_step(self, args, state, control, **options)
    if state.global_step == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Progress.on_step_end = end_or_die  # type: ignore[method-assign]
    if engine() == "none":
        sys.exit(main())
    runpy.run_path(str(Path(__file__).with_name("on_cpu.py")), run_name="__main__")
