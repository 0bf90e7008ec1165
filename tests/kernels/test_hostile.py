"""Tensors of every kind that torch has: a right answer or an error, never a crash and never a wrong answer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from loretta_kernels import TT, TTShape, reference, tt_adapter, tt_linear, tt_lora, tt_matrix
from loretta_kernels.selfcheck import error

from .problems import TINY_DOWN, TINY_UP, tiny_problem


class Logged(Tensor):
    """A subclass of the kind that libraries make."""


KINDS = {
    "plain": lambda t: t,
    "negated": lambda t: torch._neg_view(-t),
    "half-of-a-complex": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "zero-tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "meta": lambda t: t.to("meta"),
    "parameter": lambda t: torch.nn.Parameter(t),
    "subclass": lambda t: t.as_subclass(Logged),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "stride-two": lambda t: torch.stack([t, t], -1)[..., 0],
    "bf16": lambda t: t.bfloat16(),
    "fp16": lambda t: t.half(),
    "fp64": lambda t: t.double(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e5m2),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "empty": lambda t: t[:0],
    "one-too-few": lambda t: t[..., :-1],
    "one-dimension-more": lambda t: t[None],
    "requires-grad": lambda t: t.clone().requires_grad_(),
    "non-leaf": lambda t: t.clone().requires_grad_() * 1,
    "inference": lambda t: _inference(t),
    "a-list": lambda t: t.tolist(),
    "none": lambda t: None,
}  # fmt: skip
PLACES = ("x", "down", "down_bias", "up", "up_bias", "residual", "scale")


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def call(functions, operator, tensors):
    """y of a tiny problem with these tensors."""
    down = TT(tensors["down"], TINY_DOWN, tensors.get("down_bias"))
    if operator == "tt_linear":
        return functions.tt_linear(tensors["x"], down)
    up, options = TT(tensors["up"], TINY_UP, tensors.get("up_bias")), {"residual": tensors["residual"]}
    if tensors["scale"] is not None:
        options["scale"] = tensors["scale"]
    return getattr(functions, operator)(tensors["x"], down, up, **options)


class Functions:
    tt_linear, tt_adapter, tt_lora = staticmethod(tt_linear), staticmethod(tt_adapter), staticmethod(tt_lora)


def plain(value):
    """The values of a tensor of any kind, in fp64."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().as_subclass(Tensor).clone().to(torch.float64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", ["tt_linear", "tt_adapter", "tt_lora"])
@pytest.mark.parametrize("place", PLACES)
def test_any_tensor_in_any_place(operator, place):
    """28 kinds of tensor in 7 places of 3 functions, forward and backward: 580 calls."""
    outcomes = {"right": 0, "refused": 0}
    for kind, make in KINDS.items():
        tensors = tiny_problem(operator, (6,), torch.float32).tensors
        if place not in tensors:
            continue
        tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        try:
            tensors[place] = make(tensors[place].detach())
        except (RuntimeError, IndexError):  # torch has no such tensor of this size
            continue
        try:
            y = call(Functions, operator, tensors)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as refusal:
            outcomes["refused"] += bool(str(refusal))
            continue
        outcomes["right"] += 1
        if y.is_meta:
            continue
        wanted = call(reference, operator, {name: plain(t) for name, t in tensors.items()})
        bar = 4 * max(torch.finfo(y.dtype).eps, torch.finfo(torch.promote_types(tensors["x"].dtype, torch.float32)).eps)
        assert error(plain(y), wanted) < bar, (kind, place)
        if y.requires_grad:
            leaves = [t for t in tensors.values() if isinstance(t, Tensor) and t.requires_grad]
            doubles = {name: plain(t) for name, t in tensors.items()}
            for name, t in tensors.items():
                if isinstance(t, Tensor) and t.requires_grad:
                    doubles[name].requires_grad_()
            of = [t for t in doubles.values() if isinstance(t, Tensor) and t.requires_grad]
            dy = torch.randn_like(wanted)
            exact = torch.autograd.grad(call(reference, operator, doubles), of, dy.to(y.dtype).double())
            for ours, right in zip(torch.autograd.grad(y, leaves, dy.to(y.dtype)), exact, strict=True):
                assert error(plain(ours), right) < 8 * max(bar, 2**-22), (kind, place)
    assert outcomes["right"] >= 5 or place not in tiny_problem(operator).tensors


GRADIENTS = [kind for kind in KINDS if kind not in ("a-list", "none", "requires-grad", "non-leaf", "parameter")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", GRADIENTS)
def test_any_gradient_that_arrives(kind):
    problem = tiny_problem("tt_adapter", (6,), torch.float32)
    x = problem.x.clone().requires_grad_()
    y = problem.with_tensors({"x": x}).run()
    dy = KINDS[kind](torch.randn(y.shape))
    try:
        (dx,) = torch.autograd.grad(y, x, dy)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return
    x64 = problem.x.double().requires_grad_()
    exact = torch.autograd.grad(problem.to(torch.float64).with_tensors({"x": x64}).run(reference), x64, plain(dy))
    assert error(plain(dx), exact[0]) < 1e-2 if dy.dtype is not torch.float32 else 1e-5


@pytest.mark.parametrize("place", [p for p in PLACES if p != "x"])
def test_tensors_on_two_devices_are_named(place):
    if place == "scale":
        pytest.skip("a scale follows x, as numbers do")
    tensors = tiny_problem("tt_adapter", (6,), torch.float32).tensors
    tensors[place] = tensors[place].to("meta")
    with pytest.raises(RuntimeError, match=r"all tensors must be on one device, but x is on cpu, .* is on meta"):
        call(Functions, "tt_adapter", tensors)


def test_the_gradient_must_be_on_the_device_of_x():
    x = torch.randn(3, 12, requires_grad=True)
    y = tt_linear(x, TT(torch.randn(TINY_DOWN.num_params), TINY_DOWN))
    with pytest.raises(RuntimeError, match="cpu"):
        y.backward(torch.randn(3, 4, device="meta"))


def test_tt_matrix_of_a_negated_view():
    cores = torch.randn(TINY_DOWN.num_params)
    assert torch.equal(tt_matrix(TT(torch._neg_view(-cores), TINY_DOWN)), tt_matrix(TT(cores, TINY_DOWN)))


SMOOTH = dict(itertools.islice(tiny_problem("tt_adapter", activation="tanh").tensors.items(), 7))


def smooth(x: Tensor, down: Tensor, functions=Functions, **options) -> Tensor:
    """A smooth scalar function of a row and of cores."""
    up = TT(SMOOTH["up"], TINY_UP, SMOOTH["up_bias"])
    return functions.tt_adapter(x, TT(down, TINY_DOWN), up, activation="tanh", **options).sin().sum()


@pytest.mark.parametrize("argnums", [0, 1])
def test_per_sample_gradients_by_vmap_of_grad(argnums):
    x, down = SMOOTH["x"], SMOOTH["down"]
    per_sample = torch.func.vmap(torch.func.grad(smooth, argnums), in_dims=(0, None))(x, down)
    for row, found in zip(x, per_sample, strict=True):
        leaves = row.clone().requires_grad_(), down.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(smooth(*leaves, functions=reference), leaves[argnums])
        torch.testing.assert_close(found, wanted)


def test_forward_mode_differentiation():
    x, down, tangent = SMOOTH["x"], SMOOTH["down"], torch.randn_like(SMOOTH["down"])
    wanted = torch.func.grad(smooth, 1)(x, down) @ tangent
    assert torch.allclose(torch.func.jvp(lambda d: smooth(x, d), (down,), (tangent,))[1], wanted)
    with forward_ad.dual_level():
        y = smooth(x, forward_ad.make_dual(down, tangent))
        assert torch.allclose(forward_ad.unpack_dual(y).tangent, wanted)


def test_the_hessian_is_that_of_the_definition():
    x, down = SMOOTH["x"], SMOOTH["down"]
    hessian = torch.func.hessian(lambda d: smooth(x, d))(down)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda d: smooth(x, d, functions=reference))(down))


def test_a_gradient_penalty_trains():
    """A second derivative, with dropout: the same mask in the forward, its gradient, and the gradient's gradient."""
    results = []
    for functions, options in ((Functions, {"dropout_p": 0.4, "seed": 3}), (reference, {})):
        x, down = SMOOTH["x"].clone().requires_grad_(), SMOOTH["down"].clone().requires_grad_()
        if functions is reference:
            options = {"mask": tiny_problem("tt_adapter", dropout_p=0.4, seed=0).mask()}
            from loretta_kernels.philox import dropout_factor

            options = {"mask": dropout_factor(torch.tensor(3), 0, 6, 12, 0.4, torch.float64)}
        (dx,) = torch.autograd.grad(smooth(x, down, functions, **options), x, create_graph=True)
        dx.square().sum().backward()
        results.append((dx.detach(), down.grad, x.grad))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_trains_are_pytrees():
    train = TT(torch.randn(TINY_DOWN.num_params), TINY_DOWN, torch.randn(4))
    stacked = torch.utils._pytree.tree_map(lambda t: torch.stack([t, 2 * t]), train)
    assert (stacked.shape, stacked.cores.shape) == (TINY_DOWN, (2, TINY_DOWN.num_params))
    x = torch.randn(5, 12)
    ys = torch.func.vmap(lambda train: tt_linear(x, train))(stacked)
    torch.testing.assert_close(ys[0], tt_linear(x, train))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", ["tt_linear", "tt_adapter", "tt_lora"])
def test_a_traced_graph_holds_torch_s_own_operators(operator):
    problem = tiny_problem(operator, (6,), torch.float32)
    traced = torch.jit.trace(lambda x: problem.with_tensors({"x": x}).run(), problem.x)
    assert "loretta::" not in str(traced.graph)
    other = torch.randn(9, 12)
    if operator == "tt_linear":
        torch.testing.assert_close(traced(other), problem.with_tensors({"x": other}).run())
    torch.testing.assert_close(traced(problem.x), problem.run())


def test_an_exported_program_takes_any_number_of_rows():
    class Linear(torch.nn.Module):
        def forward(self, x, train):
            return tt_linear(x, train)

    x, train = torch.randn(5, 12), TT(torch.randn(TINY_DOWN.num_params), TINY_DOWN, torch.randn(4))
    dynamic = {"x": {0: torch.export.Dim("n")}, "train": [None, None]}
    exported = torch.export.export(Linear(), (x, train), dynamic_shapes=dynamic)
    for rows in (5, 9):
        other = torch.randn(rows, 12)
        torch.testing.assert_close(exported.module()(other, train), tt_linear(other, train))


@pytest.mark.parametrize("operator", ["tt_linear", "tt_adapter", "tt_lora"])
def test_the_onnx_exporter_sees_torch_s_own_operators(operator, monkeypatch):
    class Call(torch.nn.Module):
        def forward(self, x):
            return problem.with_tensors({"x": x}).run()

    problem = tiny_problem(operator, (6,), torch.float32)
    assert "loretta" in str(torch.export.export(Call(), (problem.x,), strict=False).graph)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = torch.export.export(Call(), (problem.x,), strict=False)  # as torch.onnx.export does
    assert "loretta" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(problem.x), problem.run())


def test_ranks_of_one_and_sizes_of_one():
    shape = TTShape((1,), (1,), 1)
    assert tt_linear(torch.ones(3, 1), TT(torch.tensor([2.0, 3.0]), shape)).tolist() == [[6.0]] * 3
