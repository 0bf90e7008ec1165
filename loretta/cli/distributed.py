"""One run in several processes: connecting them, raising errors in all of them, gathering sharded tensors."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loretta.cli.report import UserError, refusing


def engine() -> str:
    """What shards the model: "fsdp" or "deepspeed", as `accelerate launch` sets in the environment, else "none"."""
    return next((name for name in ("fsdp", "deepspeed") if _asked(name)), "none")


def _asked(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what.upper()}", "false").lower() in ("1", "true")


def device() -> torch.device:
    """The accelerator that the Trainer will use, or the CPU.

    PyTorch built for CUDA names "cuda" as current_accelerator() without a GPU, too.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def on_cpu() -> bool:
    """Whether accelerate must be told to use the CPU; it connects no processes there by itself."""
    return _asked("cpu") or (device().type == "cpu" and engine() == "none")


def connect() -> None:
    """Join the launcher's process group, if there is one, and refuse what accelerate would ignore silently."""
    started, wanted = int(os.environ.get("WORLD_SIZE", 1)), engine()
    if wanted != "none" and on_cpu():
        raise UserError(
            f"{wanted} was asked for together with use_cpu, where accelerate shards nothing; drop one of them"
        )
    with refusing(f"{wanted} was asked for", ImportError):
        state = PartialState(cpu=on_cpu())
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:  # its own, which writes to stdout, where the result goes
            handler.stream = sys.stderr  # setStream() would flush what an earlier run in this process has closed
    if started != state.num_processes:
        raise UserError(
            f"this is one of {started} processes, but accelerate connected {state.num_processes}: {wanted} needs "
            f"accelerators, and the device here is {state.device}; on CPUs use torchrun alone"
        )
    if wanted != "none" and state.distributed_type == DistributedType.NO:
        raise UserError(f"{wanted} was asked for, but one process alone was started, where accelerate shards nothing")


def disconnect() -> None:
    """Leave the process group once every process is done."""
    PartialState().wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def agreed() -> Iterator[None]:
    """Where one process raises a UserError, all raise it, so that none waits for one that has ended."""
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    first = next((text for text in gather_object([error and str(error)]) if text is not None), None)
    if first is not None:
        raise UserError(first) from error


def numel(parameter: torch.nn.Parameter) -> int:
    """The number of elements, also of a parameter that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """What was trained of a sharded model, whole and on the CPU, with every buffer; None for a model not sharded.

    Every process must call it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward the last layers are still gathered
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if any(hasattr(value, "ds_id") for value in trained.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            whole = {name: value.detach().cpu().clone() for name, value in trained.items()}
    elif any(isinstance(value, DTensor) for value in trained.values()):
        whole = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in trained.items()
        }
    else:
        return None
    return whole | {name: value.cpu() for name, value in model.named_buffers()}
