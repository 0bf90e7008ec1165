"""Measures one operator at one size against its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.memory import peak_bytes, saved_bytes
from bench.peers import BARS, OURS, Peer, base_linear, copy_of_the_bytes, peers_of
from bench.problems import Cell, Problem
from bench.timing import Rounds
from bench.upstream import Unavailable

AGAIN = "loretta again"
BASE_ROUNDS = 3


class Measurement:
    """A cell's peers, checked; `rounds` times them; `record` is what is known then.

    Attributes:
        red: what each peer of another output or gradient than the definition is off by. It is not timed.
        unavailable: why a peer cannot run here.
    """

    def __init__(self, cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
        self.problem = Problem(cell, dtype, device)
        self.red: dict[str, float] = {}
        self.unavailable: dict[str, str] = {}
        self._facts: dict[str, dict[str, float]] = {}
        peers: dict[str, Peer] = {}
        for name, make in peers_of(self.problem):
            try:
                peer = make()
            except Unavailable as error:
                self.unavailable[name] = str(error)
                continue
            error = peer.error(self.problem)
            if error <= BARS[dtype]:
                peers[name] = peer
                self._facts[name] = {"error": error} | self._memory(peer)
            else:
                self.red[name] = error
        works = {name: peer.work(self.problem.dy) for name, peer in peers.items()}
        if OURS in peers:
            works[AGAIN] = peers[OURS].work(self.problem.dy)
        works["copy"] = copy_of_the_bytes(self.problem)
        self.rounds = Rounds(works, device)

    def _memory(self, peer: Peer) -> dict[str, float]:
        """Bytes kept for backward (x among them, parameters not), and the peak of forward and backward."""
        parameters = [leaf for name, leaf in peer.leaves.items() if name != "x"]
        step = peer.work(self.problem.dy)
        return {
            "saved_bytes": saved_bytes(peer.forward, parameters),
            "peak_bytes": peak_bytes(lambda: step.backward(step.forward()), self.problem.device),
        }

    def record(self) -> dict[str, Any]:
        """The size, what each peer took and kept, and the difference between the two timings of ours."""
        cell, times = self.problem.cell, self.rounds.summary()
        base = Rounds({"base linear": base_linear(self.problem)}, self.problem.device, dropped=1)
        for _ in range(BASE_ROUNDS):
            base()
        again = times.pop(AGAIN, None)
        return {
            "kind": cell.kind,
            "d": cell.d,
            "width": cell.width,
            "rank": cell.rank,
            "N": cell.N,
            "dtype": str(self.problem.dtype).removeprefix("torch."),
            "drift": None if again is None else again["both"] / times[OURS]["both"] - 1,
            "peers": {name: times[name] | self._facts.get(name, {}) for name in times} | base.summary(),
            "red": self.red,
            "unavailable": self.unavailable,
        }


def measure(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    benchmark: Any,
    record: Callable[[dict[str, Any]], None],
) -> None:
    """One cell as a test: pytest-benchmark runs the rounds; a peer that is off fails it, after the others' times."""
    measurement = Measurement(cell, dtype, device)
    benchmark.pedantic(measurement.rounds, rounds=measurement.rounds.needed(seconds), iterations=1)
    found = measurement.record()
    benchmark.extra_info.update(found)
    record(found)
    assert not measurement.red, f"{cell.name}: not the definition's output and gradients: {measurement.red}"
