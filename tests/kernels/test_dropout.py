"""Dropout of x: one seed, one mask, in every backend; its rate; and that backward and a recomputation draw it again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loretta_kernels import TT, TTShape, tt_adapter, tt_lora
from loretta_kernels.philox import ROUNDS, random_bits
from loretta_kernels.selfcheck import check, random_problem

from .problems import DTYPES, assert_equal, square, tiny_problem

SHAPES = square(512, 8, 2)
BLOCKS = (2, 300)  # rows that fill two blocks and a part of a third
WORD = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
    """Four 32-bit words for every counter `[..., 4]`: Philox4x32 (Salmon et al., SC 2011), written for the reader."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(word) for word in key]
    for _ in range(rounds):
        low, high = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high & WORD, low >> 32 ^ c[3] ^ k[1], low & WORD]
        k = [(word + weyl) & WORD for word, weyl in zip(k, map(np.uint64, (0x9E3779B9, 0xBB67AE85)), strict=True)]
    return np.stack(c, -1)


def emulated_mask(rows: int, columns: int, p: float, seed: int, first_row: int = 0) -> torch.Tensor:
    """What x is multiplied by: half column % 2 of word column % 8 // 2 of the counter (row, column // 8)."""
    counter = np.zeros((rows, -(-columns // 8), 4), np.uint64)
    row = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    counter[..., 0], counter[..., 1], counter[..., 2] = row & WORD, row >> 32, np.arange(counter.shape[1])[None, :]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), ROUNDS)
    bits = np.stack([words & 0xFFFF, words >> 16], -1).astype(np.int64).reshape(rows, -1)[:, :columns]
    signed = (bits + 2**15) % 2**16 - 2**15
    return torch.from_numpy(signed >= round(p * 2**16) - 2**15).double() / (1 - p)


def mask_of(rows: int, columns: int, p: float, seed: int) -> torch.Tensor:
    """The mask that an operator multiplies its input by, seen through trains that keep features apart."""
    x = torch.ones(rows, columns, dtype=torch.float64, requires_grad=True)
    shape = TTShape((columns,), (1,), 1)
    trains = TT(torch.ones(shape.num_params).double(), shape), TT(torch.ones(2).double(), TTShape((1,), (1,), 1))
    tt_lora(x, *trains, dropout_p=p, seed=seed).sum().backward()
    return x.grad


def test_the_emulation_is_philox():
    # Random123's known answers for philox4x32-10: zeros, ones, the digits of pi.
    zeros = philox(np.zeros((1, 4)), (0, 0), 10)
    assert zeros.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    ones = philox(np.full((1, 4), 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 10)
    assert ones.tolist() == [[0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]]
    pi = philox(np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]), (0xA4093822, 0x299F31D0), 10)
    assert pi.tolist() == [[0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]]


@pytest.mark.parametrize("seed", [0, 1, -4, 2**63 - 1, -(2**63), 123456789012])
@pytest.mark.parametrize("size", [(9, 512), (3, 31), (1, 1), (300, 513)], ids=str)
def test_the_mask_is_the_emulated_one_for_every_bit_of_the_seed(size, seed):
    assert torch.equal(mask_of(*size, 0.4, seed), emulated_mask(*size, 0.4, seed))


def test_rows_beyond_32_bits_have_masks_of_their_own():
    for first in (2**32 - 3, 2**33 + 1):
        bits = random_bits(torch.tensor(5), first, 6, 16)
        assert torch.equal((bits >= round(0.3 * 2**16) - 2**15).double() / 0.7, emulated_mask(6, 16, 0.3, 5, first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["x", "another"])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_output_and_gradients_are_those_of_the_definition_under_the_same_mask(p, residual, dtype):
    check(random_problem("tt_adapter", SHAPES, BLOCKS, dtype, residual=residual, activation="gelu", dropout_p=p))


def test_tt_lora_drops_on_the_way_in_too():
    check(random_problem("tt_lora", SHAPES, 50, torch.float64, dropout_p=0.4))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_the_asked_share_and_rows_columns_and_seeds_are_independent(p):
    masks = torch.stack([mask_of(512, 512, p, seed) for seed in (1, 2)])
    dropped = masks == 0
    assert torch.equal(masks[~dropped], torch.full_like(masks[~dropped], 1 / (1 - p)))
    deviation = (p * (1 - p) / masks.numel()) ** 0.5
    assert abs(dropped.double().mean().item() - p) < 4 * deviation
    centred = (dropped.double() - p) / (p * (1 - p)) ** 0.5
    for dim in range(3):
        for step in (1, 2, 4, 8) if dim else (1,):
            assert abs((centred * centred.roll(step, dim)).mean().item()) < 4 * masks.numel() ** -0.5


@pytest.mark.parametrize(("p", "lost"), [(1e-9, 0.0), (1 - 1e-9, 1.0)], ids=["next-to-none", "next-to-all"])
def test_either_end_of_its_range(p, lost):
    assert (mask_of(4, 64, p, 1) == 0).double().mean().item() == pytest.approx(lost, abs=0.02)


def run(**options) -> torch.Tensor:
    """y of a fixed problem, with dropout."""
    problem = tiny_problem("tt_adapter", (40,), torch.float32, residual="none", activation="relu")
    torch.manual_seed(options.pop("manual_seed", 0))
    return problem.run(**{"dropout_p": 0.5} | options)


def test_manual_seed_reproduces_a_draw():
    assert torch.equal(run(manual_seed=1), run(manual_seed=1))
    assert not torch.equal(run(manual_seed=1), run(manual_seed=2))


def test_draws_again_at_every_call():
    problem = tiny_problem("tt_adapter", (40,), torch.float32)
    assert not torch.equal(problem.run(dropout_p=0.5), problem.run(dropout_p=0.5))


@pytest.mark.parametrize("seed", [0, 9, -4, 2**63 - 1])
def test_a_seed_fixes_the_mask_whatever_the_rng_is_at(seed):
    as_tensors = torch.tensor(seed), torch.tensor([seed])
    ys = [run(seed=seed, manual_seed=k) for k in (1, 2)] + [run(seed=tensor) for tensor in as_tensors]
    assert all(torch.equal(y, ys[0]) for y in ys)


def test_no_dropout_draws_nothing():
    before = torch.get_rng_state()
    tiny_problem("tt_lora").run(dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_a_checkpoint_recomputes_the_same_mask(reentrant):
    class Checkpointed:
        @staticmethod
        def tt_adapter(x, down, up, **options):
            def function(x, *tensors):
                trains = TT(tensors[0], down.shape, tensors[1]), TT(tensors[2], up.shape, tensors[3])
                return tt_adapter(x, *trains, **options | {"dropout_p": 0.5})

            tensors = down.cores, down.bias, up.cores, up.bias
            return checkpoint(function, x, *tensors, use_reentrant=reentrant)

    class Plain:
        @staticmethod
        def tt_adapter(*args, **options):
            return tt_adapter(*args, **options, dropout_p=0.5)

    problem = tiny_problem("tt_adapter", (40,), torch.float32, residual="none", scale=1.0)

    def solve(functions):
        torch.manual_seed(4)
        leaves = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}
        y = problem.with_tensors(leaves).run(functions)
        y.backward(problem.dy)
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    assert_equal(solve(Checkpointed), solve(Plain), 0)
