"""The contraction of the cores that PyTorch's path keeps from call to call: it serves equal cores, and no others."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from loretta_kernels import TTShape, reference, tt_adapter, tt_linear
from loretta_kernels._torch import train

from .problems import TINY_DOWN, TINY_UP, adapter_problem, assert_equal, random_cores, solve

SHAPE = TTShape((3, 4), (2, 2), (2, 3, 2))


def assert_follows(cores: torch.Tensor, shape: TTShape = SHAPE) -> None:
    """The output and the gradients of these cores are those of the definition."""
    x = torch.linspace(-1, 1, 5 * shape.in_features, dtype=cores.dtype).reshape(5, -1)
    found, wanted = ((f(x, cores, shape),) for f in (tt_linear, reference.tt_linear))
    if cores.requires_grad:
        found, wanted = ((y, *torch.autograd.grad(y.cos().sum(), cores)) for (y,) in (found, wanted))
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def in_place(cores):
    with torch.no_grad():
        cores.mul_(2)


def one_element(cores):
    with torch.no_grad():
        cores[-1] += 1


def through_data(cores):
    cores.data.add_(1)  # does not bump the version counter


def through_numpy(cores):
    cores.detach().numpy()[3] = 9  # nor does this


def other_data(cores):
    cores.data = torch.randn_like(cores)


def load_state_dict(cores):
    module = nn.Module()
    module.cores = cores
    module.load_state_dict({"cores": torch.randn_like(cores)})


def step_of(make):
    def step(cores):
        cores.grad = torch.randn_like(cores)
        make([cores]).step()

    return step


WRITES = {
    "in-place": in_place,
    "one-element": one_element,
    "data": through_data,
    "numpy": through_numpy,
    "other-data": other_data,
    "load-state-dict": load_state_dict,
    "sgd": step_of(lambda p: torch.optim.SGD(p, lr=1.0)),
    "adamw-foreach": step_of(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "adamw-fused": step_of(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_follows_every_way_of_writing_to_the_cores(write):
    cores = nn.Parameter(random_cores(SHAPE, torch.float64))
    assert_follows(cores)
    before = cores.detach().clone()
    write(cores)
    assert not torch.equal(before, cores)
    assert_follows(cores)


def test_cores_that_come_back_are_followed_too():
    cores = random_cores(SHAPE, torch.float64)
    first = cores.clone()
    for values in (first, -first, first):
        cores.copy_(values)
        assert_follows(cores)


def test_one_tensor_may_be_the_cores_of_two_shapes_and_dtypes():
    other = TTShape((2, 2), (4, 3), (2, 3, 2))
    assert other.num_params == SHAPE.num_params
    cores = random_cores(SHAPE, torch.float64)
    for shape in (SHAPE, other, SHAPE):
        assert_follows(cores, shape)
        x = torch.randn(3, shape.in_features)  # in fp32
        torch.testing.assert_close(tt_linear(x, cores, shape), reference.tt_linear(x, cores, shape))


def test_new_cores_are_not_taken_for_those_whose_memory_they_have():
    for _ in range(20):
        assert_follows(random_cores(SHAPE, torch.float64))


def test_cores_that_are_not_numbers_are_followed_back_to_numbers():
    cores = random_cores(SHAPE, torch.float64)
    kept = cores.clone()
    cores.fill_(torch.nan)
    assert tt_linear(torch.ones(1, 12, dtype=torch.float64), cores, SHAPE).isnan().all()
    cores.copy_(kept)
    assert_follows(cores)


@pytest.fixture
def contractions(monkeypatch):
    """How often trains are contracted."""
    count = []
    contract = train.Train.__init__
    monkeypatch.setattr(train.Train, "__init__", lambda self, *args: (count.append(1), contract(self, *args))[1])
    return count


def test_contracts_once_while_the_cores_are_the_same(contractions):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (6,), torch.float64, residual="none")
    leaves = {name: None if t is None else t.requires_grad_() for name, t in problem.tensors.items()}
    for _ in range(3):
        tt_adapter(**leaves | problem.options).sum().backward()
    assert len(contractions) == 2
    in_place(leaves["up"])
    tt_adapter(**leaves | problem.options)
    assert len(contractions) == 3


def test_what_is_kept_goes_with_the_cores():
    gc.collect()
    before = len(train._latest)
    cores = random_cores(SHAPE, torch.float64)
    tt_linear(torch.randn(3, 12, dtype=torch.float64), cores, SHAPE)
    assert len(train._latest) == before + 1
    del cores
    gc.collect()
    assert len(train._latest) == before


def test_what_inference_mode_contracted_serves_training():
    problem = adapter_problem(TINY_DOWN, TINY_UP, (6,), torch.float64, residual="none")
    wanted = solve(tt_adapter, problem)
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in problem.tensors.items()}
    arguments = leaves | problem.options
    with torch.inference_mode():
        tt_adapter(**arguments)
    y = tt_adapter(**arguments)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    found = {"y": y.detach()} | {f"d{name}": t.grad for name, t in leaves.items() if t is not None}
    assert_equal(found, wanted, 1e-12)


@pytest.mark.parametrize(("p", "lost"), [(1e-9, 0.0), (1 - 1e-9, 1.0)], ids=["next-to-none", "next-to-all"])
def test_dropout_at_either_end_of_its_range(p, lost):
    shape = TTShape((8, 8), (8, 8), 2)
    x = torch.ones(4, 64, dtype=torch.float64)
    y = tt_adapter(
        x,
        *(torch.ones(shape.num_params, dtype=torch.float64), shape, None) * 2,
        dropout_p=p,
        seed=1,
        activation="identity",
    )
    assert ((y == 0).double().mean().item()) == lost
