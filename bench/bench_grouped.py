"""A batch whose rows use different adapters, at one layer: pytest bench/bench_grouped.py.

512 rows, the frozen product left out, of which each uses one of 1, 8, 64 or 512 adapters drawn at random: by the
grouped operators, from adapters that PEFT holds and from stacked tensors; by a loop over the adapters; by PEFT's LoRA,
which loops too; and beside them one adapter for all. In serving forward alone; in training all adapters' gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from bench.peers import BARS
from bench.timing import Rounds, Work
from loretta import LorettaAdpConfig, LorettaRepConfig
from loretta.adp import LorettaAdpLinear
from loretta.layer import LorettaLayer
from loretta.rep import LorettaRepLinear
from loretta.stacked import Mixed

ROWS = 512
OURS = "loretta"
KINDS: dict[str, tuple[type[LorettaLayer], Any]] = {
    "rep": (LorettaRepLinear, LorettaRepConfig(init_weights=False)),
    "adp": (LorettaAdpLinear, LorettaAdpConfig(init_weights=False)),
}


class Given(nn.Linear):
    """A frozen layer whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__(output.shape[-1], output.shape[-1], bias=False, device=output.device, dtype=output.dtype)
        self.requires_grad_(False)
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output.detach()  # PEFT's LoRA adds to it in place


@dataclass(frozen=True)
class Peer:
    """A layer's forward, and the parameters that are trained."""

    trained: list[Tensor]
    run: Callable[[Tensor], Tensor]

    def work(self, x: Tensor, training: bool) -> Work:
        """As it is timed."""
        if training:
            return Work(lambda: self.run(x), lambda y: self.gradients(x, y))
        return Work(torch.no_grad()(partial(self.run, x)))

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Of the sum of y, those of x and of every parameter that is used."""
        return torch.autograd.grad(y, [x, *self.trained], torch.ones_like(y), allow_unused=True)


def peers_of(kind: str, names: list[str], adapters: int, x: Tensor) -> dict[str, Peer]:
    """Each peer by its name."""
    layer_class, config = KINDS[kind]
    layer = layer_class(Given(torch.randn_like(x))).eval()
    lora = None
    for a in range(adapters):
        layer.add_adapter(f"a{a}", config, "key")
        if lora is None:
            lora = LoraLinear(
                Given(torch.randn_like(x)), f"a{a}", config=LoraConfig(init_lora_weights=False), r=8, lora_alpha=16
            )
        else:
            lora.update_layer(f"a{a}", 8, 16, config=LoraConfig(init_lora_weights=False))
    assert lora is not None
    for each in (layer, lora):
        each.to(x).eval().requires_grad_(True)
        each.base_layer.requires_grad_(False)
    acting = layer._acting(x, names)

    def loop(x: Tensor) -> Tensor:
        with patch("loretta.layer.stacked", return_value=None):  # as for adapters that are unlike each other
            return layer(x, adapter_names=names)

    own, of_lora = ([p for p in each.parameters() if p.requires_grad] for each in (layer, lora))
    peers = {
        OURS: Peer(own, lambda x: layer(x, adapter_names=names)),
        "loop": Peer(own, loop),
        "PEFT's LoRA": Peer(of_lora, lambda x: lora(x, adapter_names=names)),
        "one for all": Peer(own, lambda x: layer.adapted(x, [(["a0"], None)])),
    }
    if isinstance(acting, Mixed):
        down, up = (replace(t, cores=t.cores.detach().requires_grad_()) for t in acting.trains[1:3])
        down, up = (t if t.bias is None else replace(t, bias=t.bias.detach().requires_grad_()) for t in (down, up))
        stack = Mixed(acting.trains._replace(down=down, up=up), acting.groups)
        leaves = [t for train in (down, up) for t in (train.cores, train.bias) if t is not None]
        peers["stacked"] = Peer(leaves, lambda x: layer.adapted(x, stack))
    return peers


@pytest.mark.parametrize("adapters", [1, 8, 64, 512])
@pytest.mark.parametrize("d", [576, 4096])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["serving", "training"])
def test_grouped(mode: str, kind: str, d: int, adapters: int, dtype, device, seconds, benchmark, record) -> None:
    torch.manual_seed(0)
    training = mode == "training"
    x = torch.randn(ROWS, d, device=device, dtype=dtype, requires_grad=training)
    names = [f"a{a}" for a in torch.randint(adapters, (ROWS,)).tolist()]
    with torch.no_grad():
        peers = peers_of(kind, names, adapters, x)

    y, alone = (peers[name].run(x) for name in (OURS, "loop"))
    pairs = [(y, alone)]
    if training:
        pairs += zip(*(peers[name].gradients(x, out) for name, out in ((OURS, y), ("loop", alone))), strict=True)
    for ours, other in pairs:
        assert (ours is None) is (other is None)
        if ours is not None and other is not None:
            assert (ours - other).norm() <= BARS[dtype] * other.norm()

    works = {name: peer.work(x, training) for name, peer in peers.items()}
    works[f"{OURS} again"] = peers[OURS].work(x, training)
    rounds = Rounds(works, device)
    benchmark.pedantic(rounds, rounds=rounds.needed(seconds), iterations=1)
    times = rounds.summary()
    again = times.pop(f"{OURS} again")
    drift = again["both"] / times[OURS]["both"] - 1
    record({"mode": mode, "kind": kind, "d": d, "adapters": adapters, "rows": ROWS, "drift": drift, "peers": times})
