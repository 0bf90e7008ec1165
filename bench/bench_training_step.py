"""A training step of a Llama with each method: pytest bench/bench_training_step.py.

Adapters at the same places compute the same function, whoever implements them: that is checked, on the loss and on
the gradient of the embeddings, before anything is timed.

A method's share of a step is, on a CPU, what its adapters take within it (bench/within.py) and the optimiser; on a GPU
what the step takes above the frozen base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from bench.models import BASE, LORA, OURS, RELEASED, Step, llama, methods, set_functions, sharing
from bench.peers import BARS
from bench.timing import Rounds, Work, interval_of_median
from bench.upstream import Unavailable
from bench.within import Within

SAME = {OURS["adp"]: (RELEASED["adp"],), OURS["rep"]: (RELEASED["rep"], LORA)}
DROPPED, AT_LEAST = 1, 9  # rounds
AGAIN = f"{BASE} again"
SMALL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Setting:
    """A model, as what differs from Llama-2-7B, its batch, and for how long it is measured."""

    name: str
    config: dict[str, int]
    tokens: int
    checkpointing: bool = False
    only_on: str = "cuda"
    seconds: float = 50.0

    def __str__(self) -> str:
        return f"{self.name}-{self.only_on}".replace(" ", "-")


SETTINGS = (
    Setting("llama 768 x 4 layers", SMALL, 128, only_on="cpu", seconds=20),
    Setting("llama 4096 x 2 layers", {"num_hidden_layers": 2, "vocab_size": 512}, 32, only_on="cpu"),
    Setting("llama 4096 x 2 layers", {"num_hidden_layers": 2}, 2048),
    Setting("llama-2-7b", {}, 2048),
    Setting("llama-2-7b checkpointing", {}, 2048, checkpointing=True),
)


@pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda setting: setting.name.replace(" ", "-") + f"-{setting.only_on}"
)
def test_training_step(setting: Setting, dtype, device, benchmark, record) -> None:
    if setting.only_on != device.type:
        pytest.skip(f"on {setting.only_on}")
    steps, unavailable = _steps(setting, dtype, device)
    red = {
        peer: error
        for ours, others in SAME.items()
        for peer in others
        if peer in steps and (error := steps[peer].difference(steps[ours])) > 10 * BARS[dtype]
    }
    right = {name: step for name, step in steps.items() if name not in red}
    within = {name: Within(step.model, steps[BASE].model) for name, step in right.items() if device.type == "cpu"}
    works = {}
    for name, step in right.items():
        work = Work(step.forward, step.backward)
        works[name] = within[name].of(work) if name in within else work
        works[f"{name}: optimiser"] = Work(step.optimise)
    works[AGAIN] = Work(steps[BASE].forward, steps[BASE].backward)
    rounds = Rounds(works, device, DROPPED)
    benchmark.pedantic(rounds, rounds=rounds.needed(setting.seconds, AT_LEAST), iterations=1)
    adapters = {name: each.above(within[BASE])[DROPPED:] for name, each in within.items()}
    found = _record(setting, dtype, rounds, right, adapters)
    found |= {"red": red, "unavailable": unavailable}
    benchmark.extra_info.update(found)
    record(found)
    assert not red, f"{setting.name}: not the loss and gradient of ours: {red}"


def _steps(setting: Setting, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Step], dict[str, str]]:
    """A step for each method that runs, and why the others do not."""
    torch.manual_seed(0)
    config = LlamaConfig(**setting.config, use_cache=False)
    base = llama(config, dtype, device)
    if setting.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    embeddings = torch.randn(1, setting.tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(config.vocab_size, (1, setting.tokens), device=device)
    steps, unavailable = {BASE: Step(sharing(base), embeddings, labels)}, {}
    for name, wrap in methods().items():
        try:
            with torch.device(device):
                model = wrap(sharing(base)).to(device)
            set_functions(model)
            steps[name] = Step(model, embeddings, labels)
        except Unavailable as error:
            unavailable[name] = str(error)
        except Exception as error:
            if name not in RELEASED.values():
                raise
            unavailable[name] = f"{type(error).__name__}: {error}"[:200]
    return steps, unavailable


def _record(
    setting: Setting, dtype: torch.dtype, rounds: Rounds, steps: dict[str, Step], adapters: dict[str, list[float]]
) -> dict[str, Any]:
    """What each method took and allocated; of a step, forward, backward and optimiser together."""
    times = rounds.summary()
    again = times.pop(AGAIN)
    found = {}
    for name, step in steps.items():
        optimiser = times[f"{name}: optimiser"]["forward"]
        total = times[name]["both"] + optimiser
        found[name] = times[name] | {
            "optimiser": optimiser,
            "step": total,
            "tokens_per_second": 1000 * setting.tokens / total,
            **_share(rounds, name, adapters.get(name)),
            "peak_bytes": step.peak_bytes,
            "trainable": sum(parameter.numel() for parameter in step.parameters),
        }
    return {
        "model": setting.name,
        "tokens": setting.tokens,
        "checkpointing": setting.checkpointing,
        "dtype": str(dtype).removeprefix("torch."),
        "drift": again["both"] / times[BASE]["both"] - 1,
        "methods": found,
    }


def _share(rounds: Rounds, name: str, adapters: Sequence[float] | None) -> dict[str, float]:
    """What a method adds to the frozen base's step, over that: by its adapters alone, where they were measured, and as
    the difference of whole steps, each round compared within itself. Medians.
    """

    def seconds(method: str) -> list[float]:
        return [sum(step) + rate for step, rate in zip(rounds.times[method], optimiser(method), strict=True)]

    def optimiser(method: str) -> list[float]:
        return [sum(rate) for rate in rounds.times[f"{method}: optimiser"]]

    base = seconds(BASE)
    whole = [own / frozen - 1 for own, frozen in zip(seconds(name), base, strict=True)]
    shares = whole
    if adapters is not None:
        shares = [(own + rate) / median(base) for own, rate in zip(adapters, optimiser(name), strict=True)]
    low, high = interval_of_median(shares)
    return {"share": median(shares), "share_low": low, "share_high": high, "whole_share": median(whole)}
