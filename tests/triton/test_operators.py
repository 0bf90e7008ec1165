"""The registered operators on the kernels: torch's own checks, whole-graph compilation, no fallback."""

from __future__ import annotations

import pytest
import torch

from loretta_kernels import backend, tt_adapter, tt_linear, tt_lora
from tests.kernels.problems import (
    TINY_DOWN,
    TINY_UP,
    adapter_problem,
    assert_equal,
    linear_problem,
    lora_problem,
    random_cores,
    solve,
)

pytest.importorskip("triton")

CASES = [
    pytest.param(tt_linear, linear_problem(TINY_DOWN, (5,), torch.float32), id="tt_linear"),
    pytest.param(
        tt_adapter,
        adapter_problem(TINY_DOWN, TINY_UP, (5,), torch.float32, residual="another", dropout_p=0.3, seed=5),
        id="tt_adapter",
    ),
    pytest.param(tt_lora, lora_problem(TINY_DOWN, TINY_UP, (5,), torch.float32), id="tt_lora"),
]


@pytest.mark.parametrize(("function", "problem"), CASES)
def test_compiles_whole_forward_and_backward(function, problem):
    torch.compiler.reset()
    with backend("triton"):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_equal(solve(compiled, problem), solve(function, problem), 1e-6)


@pytest.mark.parametrize("whole", [True, False], ids=["everything", "least"])
def test_opcheck_of_tt_linear(whole):
    x, dy = torch.randn(2, 3, 12), torch.randn(2, 3, 4)
    train = random_cores(TINY_DOWN), TINY_DOWN.spec, torch.randn(4) if whole else None
    torch.library.opcheck(torch.ops.loretta.tt_linear_fwd.default, (x, *train, "triton"))
    needs, waist = [whole, True, whole], torch.randn(6, 3)
    torch.library.opcheck(torch.ops.loretta.tt_linear_bwd.default, (dy, x, waist, *train, needs, "triton"))


@pytest.mark.parametrize("whole", [True, False], ids=["everything", "least"])
def test_opcheck_of_tt_adapter(whole):
    x, dy = torch.randn(2, 3, 12), torch.randn(2, 3, 15)
    down = random_cores(TINY_DOWN), TINY_DOWN.spec, torch.randn(4) if whole else None
    up = random_cores(TINY_UP), TINY_UP.spec, torch.randn(15) if whole else None
    trains = *down, *up, torch.ones(1) if whole else None
    residual, seed = (torch.randn(2, 3, 15), torch.tensor(3)) if whole else (None, None)
    options = False, 1.0, "gelu", 0.25 if whole else 0.0
    forward, backward = torch.ops.loretta.tt_adapter_fwd.default, torch.ops.loretta.tt_adapter_bwd.default
    torch.library.opcheck(forward, (x, *trains, residual, seed, *options, "triton"))
    needs, waist = [whole, True, whole, True, whole, whole], torch.randn(6, 3)
    torch.library.opcheck(backward, (dy, x, waist, *trains, seed, *options, needs, "triton"))


def test_fp64_is_refused_where_the_kernels_are_forced():
    problem = linear_problem(TINY_DOWN, (5,), torch.float64)
    with backend("triton"), pytest.raises(RuntimeError, match="cannot serve: the kernels compute in fp32"):
        tt_linear(**problem.tensors | problem.options)
