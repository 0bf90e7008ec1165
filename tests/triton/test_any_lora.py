"""tt_lora for any trains: as good as plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from loretta_kernels import reference, tt_lora
from tests.kernels.problems import lora_problem

from .judge import check
from .space import bottlenecks, dtypes, modes, ranks, rows, search, train

pytest.importorskip("triton")


@given(modes, bottlenecks, modes, ranks, ranks, rows, dtypes)
@search(0.2)
def test_tt_lora_for_any_trains(i, b, o, r, q, n, dtype):
    torch.manual_seed(n)
    check(tt_lora, reference.tt_lora, lora_problem(train(i, b, r), train(b[::-1], o, q), (n,), dtype))
