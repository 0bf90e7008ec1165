"""Dropout of x: the mask, its rate, and that backward and a recomputation draw the same one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loretta_kernels import TTShape, reference, tt_adapter, tt_lora

from .problems import (
    DTYPES,
    TINY_DOWN,
    TINY_UP,
    adapter_problem,
    assert_as_good_as_plain,
    assert_equal,
    dropout_mask,
    lora_problem,
    solve,
)

pytestmark = pytest.mark.usefixtures("cpu_path")

DOWN, UP = TTShape.for_matrix(512, 8, 2), TTShape.for_matrix(8, 512, 2)
BLOCKS = (2, 300)  # rows that fill two blocks and a part of a third


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["x", "another"])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_output_and_gradients_are_those_of_the_definition_under_the_same_mask(p, residual, dtype):
    problem = adapter_problem(DOWN, UP, BLOCKS, dtype, residual=residual, activation="gelu")
    mask = dropout_mask(problem.tensors["x"], p, seed=11)
    ours = solve(lambda **arguments: tt_adapter(dropout_p=p, seed=11, **arguments), problem)
    plain = solve(lambda **arguments: reference.tt_adapter(mask=mask, **arguments), problem)
    exact = solve(lambda **arguments: reference.tt_adapter(mask=mask, **arguments), problem.to(torch.float64))
    assert_as_good_as_plain(ours, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_column_of_wide_rows_has_a_mask_of_its_own(dtype):
    down, up = TTShape.for_matrix(1542, 8, 2), TTShape.for_matrix(8, 1542, 2)
    problem = adapter_problem(down, up, (9,), dtype, activation="gelu")
    mask = dropout_mask(problem.tensors["x"], 0.5, seed=11)
    ours = solve(lambda **arguments: tt_adapter(dropout_p=0.5, seed=11, **arguments), problem)
    plain = solve(lambda **arguments: reference.tt_adapter(mask=mask, **arguments), problem)
    exact = solve(lambda **arguments: reference.tt_adapter(mask=mask, **arguments), problem.to(torch.float64))
    assert_as_good_as_plain(ours, plain, exact)


@pytest.mark.parametrize("seed", [0, -4, 2**63 - 1, 123456789012])
def test_every_bit_of_the_seed_counts(seed):
    x = torch.randn(9, 512, requires_grad=True)
    a, b = torch.randn(DOWN.num_params), torch.randn(UP.num_params)
    tt_lora(x, a, DOWN, b, UP, dropout_p=0.4, seed=seed).square().sum().backward()
    assert torch.equal(x.grad == 0, dropout_mask(x, 0.4, seed) == 0)


def test_tt_lora_drops_on_the_way_in_too():
    problem = lora_problem(DOWN, UP, (50,), torch.float64)
    mask = dropout_mask(problem.tensors["x"], 0.4, seed=5)
    ours = solve(lambda **arguments: tt_lora(dropout_p=0.4, seed=5, **arguments), problem)
    assert_equal(ours, solve(lambda **arguments: reference.tt_lora(mask=mask, **arguments), problem), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_the_asked_share_and_scales_up_what_it_keeps(p, dtype):
    mask = dropout_mask(torch.empty(*BLOCKS, 512, dtype=dtype), p, seed=2)
    dropped = mask == 0
    assert torch.equal(mask[~dropped], torch.full_like(mask[~dropped], 1 / (1 - p)))
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(dropped.double().mean().item() - p) < 4 * deviation


def test_rows_blocks_and_seeds_have_masks_of_their_own():
    x = torch.empty(600, 512, dtype=torch.float32)
    rows = dropout_mask(x, 0.5, seed=2)
    assert len({tuple(row.tolist()) for row in rows}) == 600
    assert not torch.equal(rows, dropout_mask(x, 0.5, seed=3))
    assert torch.equal(rows, dropout_mask(x, 0.5, seed=2))


def run(**options) -> torch.Tensor:
    """y of a fixed problem."""
    torch.manual_seed(77)
    problem = adapter_problem(TINY_DOWN, TINY_UP, (40,), torch.float32, residual="none", dropout_p=0.5)
    torch.manual_seed(options.pop("manual_seed", 0))
    return tt_adapter(**problem.tensors | problem.options | options)


def test_manual_seed_reproduces_a_draw():
    assert torch.equal(run(manual_seed=1), run(manual_seed=1))
    assert not torch.equal(run(manual_seed=1), run(manual_seed=2))


def test_draws_again_at_every_call():
    problem = adapter_problem(TINY_DOWN, TINY_UP, (40,), torch.float32, residual="none", dropout_p=0.5)
    first, second = (tt_adapter(**problem.tensors | problem.options) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [0, 9, -4, 2**63 - 1])
def test_a_seed_fixes_the_mask_whatever_the_rng_is_at(seed):
    as_tensors = torch.tensor(seed), torch.tensor([seed])
    ys = [run(seed=seed, manual_seed=k) for k in (1, 2)] + [run(seed=tensor) for tensor in as_tensors]
    assert all(torch.equal(y, ys[0]) for y in ys)


def test_no_dropout_draws_nothing():
    before = torch.get_rng_state()
    problem = lora_problem(TINY_DOWN, TINY_UP, (4,), torch.float32, dropout_p=0.0)
    before = torch.get_rng_state()
    tt_lora(**problem.tensors | problem.options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_a_checkpoint_recomputes_the_same_mask(reentrant):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (40,), torch.float32, residual="another", dropout_p=0.5)

    def checkpointed(**arguments):
        names = list(arguments)
        return checkpoint(
            lambda *values: tt_adapter(**dict(zip(names, values, strict=True))),
            *arguments.values(),
            use_reentrant=reentrant,
        )

    torch.manual_seed(4)
    plain = solve(tt_adapter, problem)
    torch.manual_seed(4)
    assert_equal(solve(checkpointed, problem), plain, 0)
