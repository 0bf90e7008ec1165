"""The three operators in C for any trains, rows and activations: as good as plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loretta_kernels import ACTIVATIONS, TTShape, backend, reference, tt_adapter, tt_linear, tt_lora
from loretta_kernels._c import call

from ..kernels.problems import adapter_problem, linear_problem, lora_problem, solve
from ..triton.judge import check
from ..triton.space import bottlenecks, modes, ranks, rows, search, train

dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@given(
    modes, bottlenecks, modes, ranks, ranks, rows, dtypes, st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans()
)
@search(0.5)
def test_tt_adapter(i, b, o, r, q, n, dtype, activation, biases, residual):
    torch.manual_seed(n)
    down, up = train(i, b, r), train(b[::-1], o, q)
    options = {"residual": "another" if residual else "none", "biases": biases, "activation": activation}
    check(tt_adapter, reference.tt_adapter, adapter_problem(down, up, (n,), dtype, **options), "c")


@given(modes, bottlenecks, modes, ranks, ranks, rows, dtypes)
@search(0.2)
def test_tt_lora(i, b, o, r, q, n, dtype):
    torch.manual_seed(n)
    check(tt_lora, reference.tt_lora, lora_problem(train(i, b, r), train(b[::-1], o, q), (n,), dtype), "c")


@given(modes, modes, ranks, rows, dtypes, st.booleans())
@search(0.3)
def test_tt_linear(i, o, r, n, dtype, bias):
    torch.manual_seed(n)
    check(tt_linear, reference.tt_linear, linear_problem(train(i, o, r), (n,), dtype, bias=bias), "c")


LARGE = [
    pytest.param(TTShape.for_matrix(2304, 64, 16), TTShape.for_matrix(64, 2304, 16), 130, id="rank-sixteen"),
    pytest.param(TTShape.for_matrix(1600, 24, 33), TTShape.for_matrix(24, 1600, 40), 20, id="ranks-above-the-width"),
    pytest.param(TTShape.for_matrix(1031, 7, 5), TTShape.for_matrix(7, 1031, 5), 70, id="a-prime-above-two-blocks"),
    pytest.param(TTShape((1,) * 40 + (48,), (1,) * 9 + (8,), 2), TTShape((8,), (48,), 2), 9, id="fifty-cores"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("down", "up", "n"), LARGE)
def test_large_trains(down, up, n, dtype):
    check(tt_adapter, reference.tt_adapter, adapter_problem(down, up, (n,), dtype, activation="silu"), "c")


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_in_a_dtype_of_its_own(x_dtype, residual_dtype):
    down, up = TTShape.for_matrix(96, 8, 3), TTShape.for_matrix(8, 96, 3)
    problem = lora_problem(down, up, (40,), x_dtype)
    tensors = problem.tensors | {"residual": problem.tensors["residual"].to(residual_dtype)}
    answers = check(tt_lora, reference.tt_lora, replace(problem, tensors=tensors, dy_dtype=torch.bfloat16), "c")
    assert answers["y"].dtype is torch.promote_types(x_dtype, residual_dtype)
    assert answers["dx"].dtype is x_dtype
    assert answers["dresidual"].dtype is residual_dtype


@pytest.mark.parametrize("default", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_torch_defaults_change_nothing(monkeypatch, default):
    down, up = TTShape.for_matrix(96, 8, 3), TTShape.for_matrix(8, 96, 3)
    problem = adapter_problem(down, up, (40,), torch.float32)
    with backend("c"):
        wanted = solve(tt_adapter, problem)
    monkeypatch.setattr(call, "_memory", call._Memory())
    x, dy = problem.tensors["x"], torch.ones(40, 96)
    leaves = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(default.get("dtype", before))
    try:
        with backend("c"), torch.device(default.get("device", "cpu")):
            y = tt_adapter(**leaves | problem.options | {"residual": leaves["x"]})
            grads = torch.autograd.grad(y, list(leaves.values()), dy)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, wanted["y"])
    assert all(grad.dtype is torch.float32 and grad.device == x.device and grad.isfinite().all() for grad in grads)
