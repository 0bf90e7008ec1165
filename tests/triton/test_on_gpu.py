"""On a GPU: the kernels compiled, not interpreted, and captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loretta_kernels import backend, tt_lora
from loretta_kernels.selfcheck import DTYPES, adapter_case, check_cases, error, linear_case, lora_case

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
    with backend("triton"):
        missed = [row.text for row in check_cases([case], DTYPES, N, "cuda", "triton") if row.missed]
    assert not missed, "\n".join(missed)


def step_of(case, N):
    """A function that runs forward and backward of bf16 rows, and the rows, which may be overwritten."""
    problem = case.problem(N, torch.bfloat16).to("cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}

    def step() -> tuple[Tensor, ...]:
        y = problem.run()
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), problem.dy)

    return step, problem.x


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
            assert error(ours, eager.double()) <= 1e-3  # atomics add in another order


def test_every_replay_drops_other_elements():
    problem = lora_case(256, 256, 8, 5).problem(40, torch.bfloat16).to("cuda")
    graph, y = captured(lambda: tt_lora(problem.x, problem.down, problem.up, dropout_p=0.5))
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
