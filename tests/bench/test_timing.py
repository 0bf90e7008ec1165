"""Rounds alternate over what is timed, and their medians say what they should."""

from __future__ import annotations

import pytest
import torch

from bench import timing
from bench.timing import Rounds, Work

CPU = torch.device("cpu")


def rounds_in_order(count: int) -> list[str]:
    """In which order some rounds run three works."""
    order: list[str] = []
    rounds = Rounds({name: Work(lambda name=name: order.append(name)) for name in "abc"}, CPU, dropped=0)
    for _ in range(count):
        rounds()
    return ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]


def test_every_round_runs_each_work_once():
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds_in_order(30))


def test_none_always_follows_the_same():
    orders = rounds_in_order(30)
    assert len(set(orders)) == 6
    assert orders == rounds_in_order(30)


def test_backward_gets_what_forward_returned():
    given = []
    Rounds({"a": Work(lambda: 7, given.append)}, CPU, dropped=1)()
    assert given == [7, 7]


def test_medians_and_spread():
    rounds = Rounds({"a": Work(lambda: None)}, CPU)
    rounds.times["a"] = [(0.001, 0.002), (0.002, 0.002), (0.003, 0.007)]
    summary = rounds.summary()["a"]
    assert summary == pytest.approx({"forward": 2, "backward": 2, "both": 4, "spread": 3.5 / 4, "rounds": 3})


@pytest.mark.parametrize(("seconds", "expected"), [(1.05, 10), (0.1, 7), (1e9, 200)])
def test_rounds_fill_the_seconds_within_bounds(seconds, expected, monkeypatch):
    ticks = iter([0, 5, 10, 10, 15, 20, 20, 20.04, 20.05, 30, 30.02, 30.05])  # the second round takes 0.1 seconds
    monkeypatch.setattr(timing.time, "process_time", lambda: next(ticks))
    rounds = Rounds({"a": Work(lambda: None), "b": Work(lambda: None)}, CPU)
    assert rounds.times == {"a": [], "b": []}
    assert rounds.needed(seconds) == expected


def test_the_clock_sees_forward_and_backward_apart(monkeypatch):
    ticks = iter([1.0, 3.0, 8.0])
    monkeypatch.setattr(timing.time, "process_time", lambda: next(ticks))
    rounds = Rounds({"a": Work(lambda: None, lambda _: None)}, CPU, dropped=0)
    rounds()
    assert rounds.times["a"] == [(2.0, 5.0)]


@pytest.mark.parametrize(("values", "interval"), [([3, 1, 2], (1, 3)), (range(9), (1, 7)), (range(20), (5, 14))])
def test_the_interval_of_a_median_leaves_out_as_much_as_95_percent_allow(values, interval):
    assert timing.interval_of_median(list(values)) == interval
