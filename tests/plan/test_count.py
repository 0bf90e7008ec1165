"""What is counted on fake tensors is what a real step saves, allocates and keeps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from loretta.plan import CHECKPOINTING, Batch, Devices, StepCounter, memory
from loretta.plan.count import SAMPLED_BLOCKS, checkpoint
from loretta.plan.step import run_step
from tests.plan.models import METHODS, build

BATCH = Batch(rows=2, seq=24)


def saved_by_a_real_step(model: nn.Module) -> int:
    """What autograd hands to the hooks, each storage once, parameters and buffers left out."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(**BATCH.inputs()).loss  # noqa: B018
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_activations_are_those_of_a_real_step(method, attention, checkpointing, dtype) -> None:
    counter = StepCounter(lambda few: build(method, 2, attention, dtype), checkpointing, as_on_gpu=False)
    counted = counter.count(BATCH)
    real = build(method, 2, attention, dtype, "cpu")
    checkpoint(real, checkpointing)
    assert counted.saved == saved_by_a_real_step(real)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("method", ["adp", "full"])
def test_a_few_blocks_give_the_bytes_of_all_of_a_real_step(method, checkpointing) -> None:
    """The inside of operators, which fake tensors do not have, is the difference to a process's memory."""
    layers = SAMPLED_BLOCKS[-1] + 2
    counter = StepCounter(lambda few: build(method, few or layers), checkpointing, as_on_gpu=False)
    counted = counter.count(BATCH)
    real = build(method, layers, device="cpu")
    checkpoint(real, checkpointing)
    measured = run_step(real, BATCH.inputs())
    assert counted.saved == measured.saved
    # A tensor that waits for Python's garbage collector may be alive in one run and not in the other.
    assert (counted.top, counted.bottom) == pytest.approx((measured.top, measured.bottom), rel=1e-3)
    assert counter.count(BATCH) == counted


@pytest.mark.parametrize("method", METHODS)
def test_what_lasts_is_what_the_real_objects_hold(method) -> None:
    model = build(method, 2, dtype=torch.bfloat16, device="cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    step = run_step(model, BATCH.inputs())
    optimiser.step()
    moments = [tensor for state in optimiser.state.values() for tensor in state.values()]

    planned = memory(build(method, 2, dtype=torch.bfloat16), step, Devices())
    assert planned.trainable == sum(parameter.numel() for parameter in trained)
    assert planned.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert planned.optimiser == sum(tensor.nbytes for tensor in moments)


@pytest.mark.parametrize("gpus", [3, 8])
def test_a_shard_is_the_first_chunk(gpus) -> None:
    model = build("adp", 2)
    step = run_step(build("adp", 2, device="cpu"), BATCH.inputs())
    alone, sharded, copied = (
        memory(model, step, Devices(n, fsdp)) for n, fsdp in ((1, False), (gpus, True), (gpus, False))
    )
    parts = {name: torch.chunk(parameter, gpus)[0].nbytes for name, parameter in model.named_parameters()}
    assert sharded.weights == sum(parts.values()) + sum(buffer.nbytes for buffer in model.buffers())
    assert sharded.gradients == sum(parts[name] for name, p in model.named_parameters() if p.requires_grad)
    assert (copied.weights, copied.gradients, copied.optimiser) == (alone.weights, alone.gradients, alone.optimiser)
    assert copied.peak == alone.peak + alone.gradients  # DDP's buckets


def test_blocks_that_differ_are_all_run(monkeypatch) -> None:
    ran: list[int | None] = []
    count = StepCounter._count
    monkeypatch.setattr(StepCounter, "_count", lambda self, batch, n: ran.append(n) or count(self, batch, n))

    def make(few: int | None, odd: bool) -> nn.Module:
        model = build("full", few or 6)
        if odd and few is None:
            model.model.layers[4].mlp.up_proj = nn.Linear(48, 80, bias=True, device="meta")
        return model

    StepCounter(partial(make, odd=False)).count(BATCH)
    assert ran == [*SAMPLED_BLOCKS]
    ran.clear()
    StepCounter(partial(make, odd=True)).count(BATCH)
    assert ran == [None]


def test_on_a_gpu_a_dropout_mask_takes_a_byte_an_element() -> None:
    on_cpu, on_gpu = (
        StepCounter(lambda few: build("lora", 2), as_on_gpu=as_on_gpu).count(BATCH).saved for as_on_gpu in (False, True)
    )
    elements = 2 * BATCH.rows * BATCH.seq * 48  # of the second block's two targets: the first's input needs no gradient
    assert on_cpu - on_gpu == elements * (4 - 1)
