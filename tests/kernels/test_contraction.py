"""The contraction that PyTorch's path keeps from call to call: it serves equal parameters, and no others."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from torch import nn

from loretta_kernels import TT, TTShape, frozen, reference, tt_adapter, tt_linear
from loretta_kernels._torch import contraction
from loretta_kernels.selfcheck import random_problem

from .problems import TINY_DOWN, TINY_UP, tiny_problem

SHAPE = TTShape((3, 4), (2, 2), (2, 3, 2))


def random_cores(dtype=torch.float64) -> torch.Tensor:
    """Cores of the shape."""
    return random_problem("tt_linear", (SHAPE,), 1, dtype).down.cores


def assert_follows(cores: torch.Tensor, shape: TTShape = SHAPE) -> None:
    """The output and the gradients of these cores are those of the definition."""
    x = torch.linspace(-1, 1, 5 * shape.in_features, dtype=cores.dtype).reshape(5, -1)
    found, wanted = ((f(x, TT(cores, shape)),) for f in (tt_linear, reference.tt_linear))
    if cores.requires_grad:
        found, wanted = ((y, *torch.autograd.grad(y.cos().sum(), cores)) for (y,) in (found, wanted))
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def in_place(tensor):
    with torch.no_grad():
        tensor.mul_(2)


def one_element(tensor):
    with torch.no_grad():
        tensor[-1] += 1


def through_data(tensor):
    tensor.data.add_(1)  # does not bump the version counter


def through_numpy(tensor):
    tensor.detach().numpy()[3] = 9  # nor does this


def other_data(tensor):
    tensor.data = torch.randn_like(tensor)


def load_state_dict(tensor):
    module = nn.Module()
    module.tensor = tensor
    module.load_state_dict({"tensor": torch.randn_like(tensor)})


def step_of(make):
    def step(tensor):
        tensor.grad = torch.randn_like(tensor)
        make([tensor]).step()

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
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@every_write
def test_follows_every_way_of_writing_to_the_cores(write):
    cores = nn.Parameter(random_cores())
    assert_follows(cores)
    before = cores.detach().clone()
    write(cores)
    assert not torch.equal(before, cores)
    assert_follows(cores)


@every_write
@pytest.mark.parametrize("name", ["down", "down_bias", "up", "up_bias", "scale"])
def test_without_gradients_every_parameter_of_an_adapter_is_followed(name, write):
    problem = tiny_problem("tt_adapter", activation="silu")
    parameter = nn.Parameter(problem.tensors[name].reshape(-1))
    if parameter.numel() == 1 and write is through_numpy:
        pytest.skip("one element only")
    problem = problem.with_tensors({name: parameter})
    with torch.no_grad():
        problem.run()
    write(parameter)
    with torch.no_grad():
        torch.testing.assert_close(problem.run(), problem.run(reference), rtol=1e-9, atol=1e-12)


def test_cores_that_come_back_are_followed_too():
    cores = random_cores()
    first = cores.clone()
    for values in (first, -first, first):
        cores.copy_(values)
        assert_follows(cores)


def test_one_tensor_may_be_the_cores_of_two_shapes_and_dtypes():
    others = TTShape((2, 2), (4, 3), (2, 3, 2)), TTShape((3, 4), (2, 2), (2, 3, 2), gains=(1, 2))
    cores = random_cores()
    for shape in (SHAPE, *others, SHAPE):
        assert_follows(cores, shape)
        x, train = torch.randn(3, shape.in_features), TT(cores, shape)  # x in fp32
        torch.testing.assert_close(tt_linear(x, train), reference.tt_linear(x, train))


def test_new_cores_are_not_taken_for_those_whose_memory_they_have():
    for _ in range(20):
        assert_follows(random_cores())


def test_cores_that_are_not_numbers_are_followed_back_to_numbers():
    cores = random_cores()
    before = cores.clone()
    cores.fill_(torch.nan)
    assert tt_linear(torch.ones(1, 12, dtype=torch.float64), TT(cores, SHAPE)).isnan().all()
    cores.copy_(before)
    assert_follows(cores)


@pytest.fixture
def contractions(monkeypatch):
    """How often trains are contracted."""
    count = []
    contract = contraction.Contraction.__init__
    monkeypatch.setattr(
        contraction.Contraction, "__init__", lambda self, *args: (count.append(1), contract(self, *args))[1]
    )
    return count


def test_contracts_once_while_the_cores_are_the_same(contractions):
    leaves = tiny_problem("tt_adapter", residual="none")
    leaves = leaves.with_tensors({name: t.requires_grad_() for name, t in leaves.tensors.items()})
    for _ in range(3):
        leaves.run().sum().backward()
    assert len(contractions) == 2
    in_place(leaves.up.cores)
    leaves.run()
    assert len(contractions) == 3


def test_what_is_remembered_goes_with_the_cores():
    gc.collect()
    before = len(contraction._latest)
    cores = random_cores()
    tt_linear(torch.randn(3, 12, dtype=torch.float64), TT(cores, SHAPE))
    assert len(contraction._latest) == before + 1
    del cores
    gc.collect()
    assert len(contraction._latest) == before


def test_what_inference_mode_contracted_serves_training():
    problem = tiny_problem("tt_adapter", residual="none")
    wanted = problem.solve(reference)
    leaves = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}
    with torch.inference_mode():
        problem.with_tensors(leaves).run()
    y = problem.with_tensors(leaves).run()
    y.backward(problem.dy)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, wanted[f"d{name}"], rtol=1e-9, atol=1e-12)


def test_frozen_contracts_once_and_trusts_the_promise(contractions):
    problem = tiny_problem("tt_adapter", residual="none")
    with torch.no_grad(), frozen():
        first = problem.run()
        assert torch.equal(problem.run(), first)
        assert len(contractions) == 2
        through_data(problem.up.cores)  # breaks the promise in a way that no counter sees
        assert torch.equal(problem.run(), first)
        in_place(problem.up.cores)  # and in one that the version counter sees
        assert not torch.equal(problem.run(), first)
    with torch.no_grad():
        torch.testing.assert_close(problem.run(), problem.run(reference), rtol=1e-9, atol=1e-12)


def test_frozen_is_a_promise_of_one_block():
    problem = tiny_problem("tt_linear")
    with frozen():
        problem.run()
    through_data(problem.down.cores)
    torch.testing.assert_close(problem.run(), problem.run(reference), rtol=1e-9, atol=1e-12)


def test_a_module_without_gradients_follows_its_cores():
    from loretta_kernels.nn import TTAdapter

    adapter = TTAdapter(12, bottleneck=4, rank=2, activation="gelu").double()
    adapter.up.reset_parameters()
    x = torch.randn(3, 12, dtype=torch.float64)
    for change in (lambda: None, lambda: in_place(adapter.up.cores), adapter.down.reset_parameters, adapter.train):
        change()
        with torch.no_grad():
            wanted = reference.tt_adapter(x, adapter.down.tt, adapter.up.tt, activation="gelu", residual=x)
            torch.testing.assert_close(adapter(x), wanted, rtol=1e-9, atol=1e-12)


def test_shapes_that_share_cores_do_not_share_what_is_derived():
    cores = torch.randn(TINY_UP.num_params, dtype=torch.float64)
    for down in (random_cores(), random_cores()):
        x = torch.randn(3, 12, dtype=torch.float64)
        for scale in (1.0, 2.0):
            options = {"activation": "identity", "scale": scale}
            trains = TT(down, TINY_DOWN), TT(cores, TINY_UP)
            torch.testing.assert_close(
                tt_adapter(x, *trains, **options), reference.tt_adapter(x, *trains, **options), rtol=1e-9, atol=1e-12
            )


def test_what_is_cached_for_another_device_goes_with_the_cores():
    """Where values are not copied, the cache must not hold the tensor by whose life it is kept."""
    cores = torch.empty(SHAPE.num_params, device="meta")
    contraction.contract(cores, SHAPE, torch.float32)
    alive = ref(cores)
    del cores
    gc.collect()
    assert alive() is None
