"""tt_linear for any train: as good as plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loretta_kernels import reference, tt_linear
from tests.kernels.problems import linear_problem

from .judge import check
from .space import dtypes, modes, ranks, rows, search, train

pytest.importorskip("triton")


@given(modes, modes, ranks, rows, dtypes, st.booleans())
@search(0.3)
def test_tt_linear_for_any_train(i, o, r, n, dtype, bias):
    torch.manual_seed(n)
    check(tt_linear, reference.tt_linear, linear_problem(train(i, o, r), (n,), dtype, bias=bias))
