"""What it takes to wrap a model: pytest bench/bench_wrapping.py. Time, peak memory, and no dense weight allocated."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaConfig

from bench.memory import Allocations, peak_bytes
from bench.models import OURS, RELEASED, llama, methods, our_config, sharing
from bench.timing import DROPPED, Rounds, Work
from bench.upstream import Unavailable, load
from loretta import get_peft_model

ROUNDS = 3
META_SECONDS = 5.0


@pytest.mark.parametrize("kind", ["adp", "rep"])
def test_wrapping_two_layers(kind: str, dtype, device, benchmark, record) -> None:
    config = LlamaConfig(num_hidden_layers=2, vocab_size=512)
    base, wrap, unavailable = llama(config, dtype, device), methods(), {}
    try:
        load()
        names = [OURS[kind], RELEASED[kind]]
    except Unavailable as error:
        names, unavailable = [OURS[kind]], {RELEASED[kind]: str(error)}

    works, peaks = {}, {}
    for name in [*names, f"{OURS[kind]} again"]:
        function, fresh = wrap[name.removesuffix(" again")], [sharing(base) for _ in range(ROUNDS + DROPPED)]
        works[name] = Work(lambda function=function, fresh=fresh: function(fresh.pop()))
    for name in names:
        model = sharing(base)
        peaks[name] = peak_bytes(lambda name=name, model=model: wrap[name](model), device)
    with Allocations(config.hidden_size**2) as allocations:
        wrap[OURS[kind]](sharing(base))

    rounds = Rounds(works, device)
    benchmark.pedantic(rounds, rounds=ROUNDS, iterations=1)
    times = rounds.summary()
    again = times.pop(f"{OURS[kind]} again")
    record(
        {
            "model": "llama 4096 x 2 layers",
            "kind": kind,
            "drift": again["both"] / times[OURS[kind]]["both"] - 1,
            "methods": {name: times[name] | {"peak_bytes": peaks[name]} for name in names},
            "dense_allocations": len(allocations.shapes),
            "unavailable": unavailable,
        }
    )
    assert not allocations.shapes, f"wrapping allocated {allocations.shapes}"


@pytest.mark.parametrize("kind", ["adp", "rep"])
def test_wrapping_seven_billion_on_meta(kind: str, record) -> None:
    config = LlamaConfig()
    model = llama(config, torch.bfloat16, torch.device("meta"))
    start = time.perf_counter()
    with Allocations(config.hidden_size**2) as allocations:
        get_peft_model(model, our_config(kind))
    seconds = time.perf_counter() - start
    record(
        {"model": "llama-2-7b on meta", "kind": kind, "seconds": seconds, "dense_allocations": len(allocations.shapes)}
    )
    assert not allocations.shapes, f"wrapping allocated {allocations.shapes}"
    assert seconds < META_SECONDS
