"""tt_adapter for any trains: as good as plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loretta_kernels import ACTIVATIONS, reference, tt_adapter
from tests.kernels.problems import adapter_problem

from .judge import check
from .space import bottlenecks, dtypes, modes, ranks, rows, search, train

pytest.importorskip("triton")


@given(
    modes, bottlenecks, modes, ranks, ranks, rows, dtypes, st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans()
)
@search(0.5)
def test_tt_adapter_for_any_trains(i, b, o, r, q, n, dtype, activation, biases, residual):
    torch.manual_seed(n)
    problem = adapter_problem(
        train(i, b, r),
        train(b[::-1], o, q),
        (n,),
        dtype,
        residual="another" if residual else "none",
        biases=biases,
        activation=activation,
    )
    check(tt_adapter, reference.tt_adapter, problem)
