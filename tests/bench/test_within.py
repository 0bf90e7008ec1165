"""What adapters take within a step: of their layers alone, and a step that computes the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from bench import within
from bench.models import BASE, OURS, Step, llama, methods, set_functions, sharing
from bench.timing import Work
from bench.within import Within
from loretta.rep import LorettaRepLinear

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 50,
}


@pytest.fixture
def steps() -> dict[str, Step]:
    """Those of a tiny Llama: frozen, and with adapters of LoRETTA_rep."""
    torch.manual_seed(0)
    base = llama(LlamaConfig(**CONFIG, use_cache=False), torch.float32, torch.device("cpu"))
    embeddings, labels = torch.randn(1, 5, 64, requires_grad=True), torch.randint(50, (1, 5))
    wrapped = methods()[OURS["rep"]](sharing(base))
    set_functions(wrapped)
    return {BASE: Step(sharing(base), embeddings, labels), OURS["rep"]: Step(wrapped, embeddings, labels)}


def measure(steps: dict[str, Step]) -> dict[str, Within]:
    """Three runs of each."""
    found = {name: Within(step.model, steps[BASE].model) for name, step in steps.items()}
    steps[BASE].backward(steps[BASE].forward())  # a run that is not measured may come first
    for name, step in steps.items():
        work = found[name].of(Work(step.forward, step.backward))
        for _ in range(3):
            assert work.backward is not None
            work.backward(work.forward())
    return found


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """What the measurement reads in place of the process's time: it stands still but where a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(within, "time", SimpleNamespace(process_time=lambda: clock.now))
    return clock


def test_times_the_layers_with_adapters_and_those_of_the_base(steps):
    found = measure(steps)
    of_adapters, of_base = (found[name].seconds for name in (OURS["rep"], BASE))
    assert len(of_adapters) == len(of_base) == 3
    places = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"}
    assert set(of_adapters[0]) == places
    assert places < set(of_base[0])
    assert all(seconds > 0 for run in (*of_adapters, *of_base) for seconds in run.values())


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_counts_what_an_adapter_does_forward_and_backward(monkeypatch, steps, clock, place):
    class Busy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            if place == "forward":
                clock.now += 1
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            if place == "backward":
                clock.now += 1
            return dy

    adapted = LorettaRepLinear.adapted
    monkeypatch.setattr(LorettaRepLinear, "adapted", lambda *args: Busy.apply(adapted(*args)))
    found = measure(steps)
    assert found[OURS["rep"]].above(found[BASE]) == [4, 4, 4]


def test_leaves_out_the_product_with_the_frozen_weight(monkeypatch, steps, clock):
    linear = nn.functional.linear

    def slow_linear(x, weight, bias=None):
        clock.now += 1
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", slow_linear)
    found = measure(steps)
    assert clock.now > 0
    assert all(sum(run.values()) == 0 for run in found[OURS["rep"]].seconds)


def test_a_run_that_is_not_measured_changes_nothing(steps):
    found = measure(steps)
    before = [dict(run) for run in found[BASE].seconds]
    steps[BASE].backward(steps[BASE].forward())
    assert found[BASE].seconds == before


def test_the_step_computes_the_same(steps):
    step = steps[OURS["rep"]]
    plain = step.backward(step.forward())
    within = Within(step.model, steps[BASE].model)
    measured = []
    work = within.of(Work(step.forward, lambda loss: measured.extend(step.backward(loss))))
    work.backward(work.forward())
    torch.testing.assert_close(measured, list(plain))
