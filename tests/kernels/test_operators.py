"""What all functions promise: registration, gradients, compilation, memory, any rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import loretta_kernels
from loretta_kernels import ACTIVATIONS, _dispatch
from loretta_kernels.operator import _arguments
from loretta_kernels.selfcheck import Problem, error, random_problem

from .problems import OPERATORS, TINY_DOWN, assert_equal, call_of, square, tiny_problem

every_operator = pytest.mark.parametrize("operator", OPERATORS)
ops = torch.ops.loretta


@dataclass
class Recorder(TorchDispatchMode):
    """Remembers every operator that runs inside, and the tensors it returned."""

    calls: list[tuple[str, tuple[Tensor, ...]]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        self.calls.append((str(func), tuple(t for t in outs if isinstance(t, Tensor))))
        return out

    def ours(self) -> list[tuple[str, tuple[Tensor, ...]]]:
        """The calls of operators of this library."""
        names = ((name.removesuffix(".default").removeprefix("loretta."), outs) for name, outs in self.calls)
        return [(name, outs) for name, outs in names if name.startswith("adapter_")]


@every_operator
def test_is_one_operator_forward_and_one_backward(operator):
    with Recorder() as recorder:
        tiny_problem(operator).solve()
    assert [call for call, _ in recorder.ours()] == ["adapter_forward", "adapter_backward"]


def gradcheck(problem: Problem, **options) -> None:
    """Compare every gradient, and every gradient of a gradient, with finite differences."""
    names = list(problem.tensors)
    leaves = [problem.tensors[name].clone().requires_grad_() for name in names]

    def call(*tensors):
        return problem.with_tensors(dict(zip(names, tensors, strict=True))).run(**options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_tt_adapter(activation):
    gradcheck(tiny_problem("tt_adapter", (3,), activation=activation))


@pytest.mark.parametrize("operator", ["tt_linear", "tt_lora"])
def test_gradcheck(operator):
    gradcheck(tiny_problem(operator, (3,)))


def test_gradcheck_with_x_for_its_residual_and_dropout():
    problem = random_problem("tt_adapter", square(6, 2, 2), 3, torch.float64, activation="silu", dropout_p=0.4)
    gradcheck(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["everything", "least"])
@every_operator
def test_opcheck(operator, whole, dtype):
    options = {}
    if operator != "tt_linear":
        options = {"residual": "another" if whole else "none", "dropout_p": 0.25 if whole else 0.0}
        options["scale"] = None if whole else 1.0
        options["biases"] = whole and operator == "tt_adapter"
    problem = tiny_problem(operator, (2, 3), dtype, **options)
    call = call_of(problem)
    torch.library.opcheck(ops.adapter_forward.default, _arguments(call))
    needs = [t is not None and (whole or t is not call.x) for t in call.differentiable]
    arguments = _arguments(call._replace(residual=None))
    torch.library.opcheck(ops.adapter_backward.default, (torch.randn(6, 3), problem.dy, *arguments, needs))


class Compiled:
    """The functions compiled whole."""

    def __init__(self, **options):
        self.options = {"fullgraph": True, "backend": "aot_eager"} | options

    def __getattr__(self, name):
        compiled = torch.compile(getattr(loretta_kernels, name), **self.options)
        setattr(self, name, compiled)
        return compiled


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@every_operator
def test_compiles_whole_forward_and_backward(operator, compiler):
    options = {} if operator == "tt_linear" else {"dropout_p": 0.3}
    problem = tiny_problem(operator, (2, 5), torch.float32, **options)
    assert_equal(problem.solve(Compiled(backend=compiler)), problem.solve(), 0)


def test_compiles_whole_with_x_for_its_residual_and_a_seed_drawn_inside():
    problem, compiled = random_problem("tt_adapter", square(6, 2, 2), 40, torch.float32), Compiled()

    def run():
        return problem.run(compiled, dropout_p=0.5)

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(run(), first)


def test_compiles_whole_for_any_number_of_rows():
    compiled = Compiled(dynamic=True)
    for rows in (2, 7, 30):
        problem = random_problem("tt_linear", (TINY_DOWN,), (rows, 3), torch.float32)
        assert_equal(problem.solve(compiled), problem.solve(), 0)


@pytest.mark.parametrize("residual", ["x", "another", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_stores_x_and_the_waist_and_no_more(dtype, residual):
    shapes = square(96, 8, 3)
    for operator in ("tt_adapter", "tt_lora"):
        problem = random_problem(operator, shapes, 37, dtype, residual=residual, dropout_p=0.2)
        assert stored(problem) == [((37, 3), torch.float32), ((37, 96), dtype)]
    linear = random_problem("tt_linear", shapes[:1], 37, dtype)
    assert stored(linear) == [((37, 3), torch.float32), ((37, 96), dtype)]


def stored(problem: Problem) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of what backward needs, parameters and single numbers left out."""
    problem = problem.with_tensors({name: t.requires_grad_() for name, t in problem.tensors.items()})
    parameters = {t.data_ptr() for name, t in problem.tensors.items() if name not in ("x", "residual")}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in parameters and tensor.numel() > 1:
            saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.run()
    return saved


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widens_no_more_than_a_block_of_rows_and_forms_no_matrix(dtype, dropout_p):
    from loretta_kernels._torch.rows import CPU_BLOCK

    N, I = 900, 768
    assert N * I > 5 * CPU_BLOCK
    problem = random_problem("tt_adapter", square(I, 64, 5), N, dtype, scale=1.0, dropout_p=dropout_p)
    call = call_of(problem)
    with Recorder() as recorder:
        y, waist = _dispatch.forward(call)
        grads = _dispatch.backward(call, waist, problem.dy, (True,) * 5 + (False,))
    given = {t.untyped_storage().data_ptr() for t in (problem.x, problem.dy, y, *grads) if t is not None}
    temporaries = [t for _, outs in recorder.calls for t in outs if t.untyped_storage().data_ptr() not in given]
    assert max(t.numel() for t in temporaries) <= CPU_BLOCK
    assert not [t.shape for t in temporaries if sorted(t.shape) == [64, I]]


NAMES = ("x", "down", "down_bias", "up", "up_bias", "scale")


@pytest.mark.parametrize("operator", ["tt_adapter", "tt_lora", "tt_linear"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_computes_the_gradient_that_is_wanted_and_no_other(operator, activation):
    problem = tiny_problem(operator, **({} if operator == "tt_linear" else {"activation": activation}))
    everything = problem.solve()
    for wanted in problem.tensors:
        leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in problem.tensors.items()}
        y = problem.with_tensors(leaves).run()
        with Recorder() as recorder:
            y.backward(problem.dy)
        assert torch.equal(leaves[wanted].grad, everything[f"d{wanted}"]), wanted
        computed = [grad.numel() > 0 for _, grads in recorder.ours() for grad in grads]
        assert computed == ([] if wanted == "residual" else [name == wanted for name in NAMES])


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_operator
def test_no_rows_give_an_empty_output_and_zero_gradients(operator, dtype, lead):
    answers = tiny_problem(operator, lead, dtype, **({} if operator == "tt_linear" else {"dropout_p": 0.5})).solve()
    assert answers["y"].shape[:-1] == lead
    assert answers["dx"].shape == (*lead, 12)
    assert all((answer == 0).all() for answer in answers.values())


@every_operator
def test_tensors_of_meta_give_shapes(operator):
    problem = tiny_problem(operator, (2, 5), torch.float32)
    answers = problem.to("meta").solve()
    assert {name: t.shape for name, t in answers.items()} == {name: t.shape for name, t in problem.solve().items()}
    assert all(answer.is_meta for answer in answers.values())


LAYOUTS = {
    "every-other-row": lambda randn, N, M, I: randn(2 * N, M, I)[::2],
    "every-other-column": lambda randn, N, M, I: randn(N, M, 2 * I)[..., ::2],
    "leading-dimensions-swapped": lambda randn, N, M, I: randn(M, N, I).transpose(0, 1),
    "features-first": lambda randn, N, M, I: randn(I, N, M).permute(1, 2, 0),
    "a-dimension-of-one-with-a-stride-of-its-own": lambda randn, N, M, I: randn(1, N * M, I).transpose(0, 1),
    "one-row-repeated": lambda randn, N, M, I: randn(1, 1, I).expand(N, M, I),
    "storage-offset": lambda randn, N, M, I: randn(N * M * I + 5)[5:].view(N, M, I),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@every_operator
def test_takes_any_strides(operator, layout, dtype):
    problem, randn = tiny_problem(operator, (4, 3), dtype), partial(torch.randn, dtype=dtype)
    strided = {"x": layout(randn, 4, 3, 12)}
    if operator != "tt_linear":
        strided["residual"] = layout(randn, 4, 3, 15)
    dy = layout(randn, 4, 3, 4 if operator == "tt_linear" else 15)
    outcomes = []
    for prepare in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        views = {name: t.detach().requires_grad_() for name, t in strided.items()}
        y = problem.with_tensors({name: prepare(view) for name, view in views.items()}).run()
        outcomes.append((y, *torch.autograd.grad(y, list(views.values()), prepare(dy))))
    for ours, contiguous in zip(*outcomes, strict=True):
        assert error(ours, contiguous) < (1e-12 if dtype is torch.float64 else 1e-6)


@every_operator
def test_gradients_flow_through_a_view_of_x(operator):
    problem = tiny_problem(operator)
    base = torch.cat([torch.zeros(3, 12, dtype=torch.float64), problem.x]).requires_grad_()
    problem.with_tensors({"x": base[3:]}).run().backward(problem.dy)
    assert torch.equal(base.grad[:3], torch.zeros(3, 12, dtype=torch.float64))
    assert torch.equal(base.grad[3:], problem.solve()["dx"])


@every_operator
def test_the_output_may_be_changed_in_place(operator):
    problem = tiny_problem(operator, (2, 3))
    x = problem.x.clone().requires_grad_()
    y = problem.with_tensors({"x": x}).run().mul_(2)
    y.backward(problem.dy)
    assert torch.equal(y, 2 * problem.run())
    assert torch.equal(x.grad, 2 * problem.solve()["dx"])


def test_what_backward_needs_may_not_be_changed_before_it():
    problem = tiny_problem("tt_adapter")
    x = problem.x.clone().requires_grad_()
    y = problem.with_tensors({"x": x * 1}).run()
    problem.up.cores.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
