"""Three steps of training a tiny Llama in one process, or as one of several under DDP, FSDP2 or ZeRO-3."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(("torchao", "bitsandbytes")))  # PEFT would import them, for two seconds

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.cli.distributed import gathered
from tests.tiny_models import tiny_batch, tiny_model

CONFIGS = {
    "adp": LorettaAdpConfig(task_type="CAUSAL_LM", bottleneck_size=8, tensor_rank=3, init_weights=False),
    "rep": LorettaRepConfig(task_type="CAUSAL_LM", r=4, tensor_rank=3, lora_dropout=0.0, init_weights=False),
}
STEPS, ROWS, LR = 3, 4, 1e-2
ZERO_3 = {
    "train_micro_batch_size_per_gpu": ROWS // 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,
}


def make_model(method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with random adapters; the same in every process."""
    model = get_peft_model(tiny_model("llama", num_hidden_layers=1).to(dtype), CONFIGS[method])
    return model.train()


def rows(step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step; its rows count 4 to 10 tokens, so that the processes' shares differ."""
    batch = tiny_batch("CAUSAL_LM", batch=ROWS, seed=step)
    batch["labels"] = batch["labels"].clone()
    for row, labels in enumerate(batch["labels"].unbind()):
        labels[: 2 * (row + 1)] = -100
    return batch


def loss_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The summed loss over the counted tokens, and their number."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), int((labels != -100).sum())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, as `loretta finetune` uses it."""
    return torch.optim.AdamW(trained(model).values(), lr=LR)


def train_alone(method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model after the steps in this process alone."""
    model = make_model(method, dtype)
    steps = optimiser(model)
    for step in range(STEPS):
        total, count = loss_sum(model, rows(step))
        (total / count).backward()
        steps.step()
        steps.zero_grad()
    return model


def train_together(model: nn.Module, backward: Callable[[torch.Tensor], Any], step: Callable[[], Any]) -> None:
    """The steps on this process's share of every batch; the engines average, so a share counts for all of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for number in range(STEPS):
        total, count = loss_sum(model, {name: value[rank::world] for name, value in rows(number).items()})
        counts = torch.tensor(count)
        dist.all_reduce(counts)
        backward(total * world / counts)
        step()


def with_ddp(method: str) -> tuple[nn.Module, list[bool]]:
    """Every process with the whole model."""
    model = make_model(method)
    _plainly(DistributedDataParallel(model))
    return model, []


def with_fsdp2(method: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[bool]]:
    """Each layer a unit of its own."""
    model = make_model(method, dtype)
    for layer in model.get_submodule("base_model.model.model.layers"):
        fully_shard(layer)
    fully_shard(model)
    sharded = [isinstance(value, DTensor) for value in model.parameters()]
    _plainly(model)
    return model, sharded


def with_zero3(method: str) -> tuple[nn.Module, list[bool]]:
    """Every parameter partitioned, however small."""
    import deepspeed

    model = make_model(method)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser(model), config=ZERO_3)
    sharded = [hasattr(value, "ds_id") and value.numel() == 0 and value.ds_numel > 0 for value in model.parameters()]
    with torch.no_grad():
        loss_sum(model, rows(0))  # as evaluation runs it, not through the engine
    train_together(engine, engine.backward, engine.step)
    return model, sharded


def _plainly(model: nn.Module) -> None:
    """Train with PyTorch's own optimiser."""
    steps = optimiser(model)

    def step() -> None:
        steps.step()
        steps.zero_grad()

    train_together(model, torch.Tensor.backward, step)


ENGINES: dict[str, Any] = {
    "ddp": with_ddp,
    "fsdp2": with_fsdp2,
    "fsdp2-bf16": partial(with_fsdp2, dtype=torch.bfloat16),
    "zero3": with_zero3,
}


def main(folder: str, *engines: str) -> None:
    """Run both methods under each engine; process 0 saves the adapters and what was sharded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for engine in engines:
        for method in CONFIGS:
            model, sharded = ENGINES[engine](method)
            weights = gathered(model)
            if dist.get_rank() == 0:
                saved = Path(folder) / f"{engine}-{method}"
                model.save_pretrained(saved, state_dict=weights)
                facts = {"world": dist.get_world_size(), "sharded": sharded}
                (saved / "facts.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
