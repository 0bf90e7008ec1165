"""On a GPU: the kernels compiled, not interpreted, and captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loretta_kernels.selfcheck import DTYPES, adapter_case, check, linear_case, lora_case
from loretta_kernels.selfcheck.cases import random_arguments

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

CASES = [
    adapter_case(96, 12, 3, "gelu"),
    adapter_case(768, 64, 5),
    adapter_case(4096, 64, 5, "silu"),
    adapter_case(130, 96, 20, "tanh"),
    adapter_case(23, 5, 2, "gelu_tanh"),
    lora_case(256, 97, 16, 8),
    linear_case(768, 5),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize("N", [1, 70, 1031])
@pytest.mark.parametrize("ordered", [False, True], ids=["atomics", "deterministic"])
def test_output_and_gradients_are_those_of_the_definition(case, N, ordered):
    torch.use_deterministic_algorithms(ordered, warn_only=True)
    missed = [row.text for row in check([case], DTYPES, N, torch.device("cuda")) if row.missed]
    assert not missed


def step_of(case, N, **options):
    """A function that runs forward and backward, and its rows, which may be overwritten."""
    arguments, dy = random_arguments(case, N, torch.bfloat16, torch.device("cuda"))
    x = arguments["x"]
    leaves = [t.requires_grad_() for name, t in arguments.items() if isinstance(t, Tensor) and name != "residual"]
    if arguments.get("residual") == "x":
        arguments["residual"] = x

    def step() -> tuple[Tensor, ...]:
        y = case.function()(**arguments, **options)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return step, x


def captured(step):
    """A graph of the step, and what its replays overwrite."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@every_case
@pytest.mark.parametrize("N", [1, 300])
def test_a_graph_of_forward_and_backward_replays_with_new_rows(case, N):
    step, x = step_of(case, N)
    graph, results = captured(step)
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        for ours, eager in zip(results, step(), strict=True):
            difference, size = (ours.double() - eager.double()).norm(), eager.double().norm()
            assert difference <= 1e-3 * size  # atomics add in another order


def test_every_replay_drops_other_elements():
    step, _ = step_of(lora_case(256, 256, 8, 5), 40, dropout_p=0.5)
    graph, (y, *_) = captured(step)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
