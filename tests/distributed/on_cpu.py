"""The command line in one of several CPU processes that accelerate takes for accelerators, so that it shards.

accelerate gives CPUs plain data parallelism whatever is asked of it, and transformers no bfloat16 unless told that they
are CPUs, so that alone is changed here. What is then sharded, run and saved is their own and PyTorch's work.
"""

import os
import sys

if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(("torchao", "bitsandbytes")))  # PEFT would import them, for two seconds

import transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from loretta.__main__ import main

train = Trainer._inner_training_loop


def gloo_as_accelerator(self: PartialState, *args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or (hasattr(parameter, "ds_id") and parameter.numel() == 0)


def saying_what_is_sharded(self: Trainer, *args: object, **kwargs: object) -> object:
    prepare = self._prepare_for_training

    def prepare_and_say(*args: object) -> object:
        prepared = prepare(*args)
        if self.accelerator.num_processes == 2 and all(map(is_sharded, self.model.parameters())):
            print("all parameters are sharded", file=sys.stderr, flush=True)
        return prepared

    self._prepare_for_training = prepare_and_say
    return train(self, *args, **kwargs)


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = gloo_as_accelerator
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    Trainer._inner_training_loop = saying_what_is_sharded
    sys.exit(main())
