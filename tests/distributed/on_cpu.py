"""The command line in one of several CPU processes that accelerate takes for accelerators, so that it shards.

accelerate gives CPUs plain data parallelism whatever is asked of it, so that alone is changed here: the backend and the
kind of the processes. What is then sharded, run and saved is its own and PyTorch's work.
"""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from loretta.__main__ import main


def gloo_as_accelerator(self: PartialState, *args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = gloo_as_accelerator
    sys.exit(main())
