"""What all three operators promise: registration, gradients, compilation, memory, any rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loretta_kernels import ACTIVATIONS, TTShape, _torch, tt_adapter, tt_linear, tt_lora
from loretta_kernels._dispatch import choose

from .problems import (
    TINY_DOWN,
    TINY_UP,
    Problem,
    adapter_problem,
    assert_equal,
    linear_problem,
    lora_problem,
    random_cores,
    solve,
)

pytestmark = pytest.mark.usefixtures("cpu_path")


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
        return [
            (name.removeprefix("loretta.").removesuffix(".default"), o) for name, o in self.calls if "loretta" in name
        ]


def problem_of(name: str, lead=(6,), dtype=torch.float64, **options) -> tuple[Callable[..., Tensor], Problem]:
    """A function and a small problem for it."""
    if name == "tt_linear":
        return tt_linear, linear_problem(TINY_DOWN, lead, dtype)
    if name == "tt_adapter":
        return tt_adapter, adapter_problem(TINY_DOWN, TINY_UP, lead, dtype, **{"residual": "another"} | options)
    return tt_lora, lora_problem(TINY_DOWN, TINY_UP, lead, dtype, **options)


every_function = pytest.mark.parametrize("name", ["tt_linear", "tt_adapter", "tt_lora"])
OPERATOR = {"tt_linear": "tt_linear", "tt_adapter": "tt_adapter", "tt_lora": "tt_adapter"}


@every_function
def test_is_one_operator_forward_and_one_backward(name):
    function, problem = problem_of(name)
    with Recorder() as recorder:
        solve(function, problem)
    assert [call for call, _ in recorder.ours()] == [f"{OPERATOR[name]}_fwd", f"{OPERATOR[name]}_bwd"]


def gradcheck(function: Callable[..., Tensor], problem: Problem) -> None:
    """Compare every gradient with finite differences."""
    names = [name for name, t in problem.tensors.items() if t is not None]
    leaves = [problem.tensors[name].requires_grad_() for name in names]

    def call(*tensors):
        arguments = problem.tensors | dict(zip(names, tensors, strict=True)) | problem.options
        if arguments.get("residual") == "x":
            arguments["residual"] = arguments["x"]
        return function(**arguments)

    assert torch.autograd.gradcheck(call, leaves, raise_exception=True)


def test_gradcheck_of_tt_linear():
    gradcheck(*problem_of("tt_linear", (3,)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_tt_adapter(activation):
    gradcheck(*problem_of("tt_adapter", (3,), activation=activation))


def test_gradcheck_of_tt_adapter_with_x_for_its_residual_and_dropout():
    down, up = TTShape((3, 2), (2,), 2), TTShape((2,), (2, 3), 2)
    gradcheck(tt_adapter, adapter_problem(down, up, (3,), torch.float64, activation="silu", dropout_p=0.4, seed=3))


def test_gradcheck_of_tt_lora():
    gradcheck(*problem_of("tt_lora", (3,), dropout_p=0.4, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["everything", "least"])
def test_opcheck_of_tt_linear(dtype, whole):
    x, dy = torch.randn(2, 3, 12).to(dtype), torch.randn(2, 3, 4).to(dtype)
    name = choose(x)
    train = random_cores(TINY_DOWN), TINY_DOWN.spec, torch.randn(4) if whole else None
    torch.library.opcheck(torch.ops.loretta.tt_linear_fwd.default, (x, *train, name))
    needs = [whole, True, whole]
    torch.library.opcheck(torch.ops.loretta.tt_linear_bwd.default, (dy, x, torch.randn(6, 3), *train, needs, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["everything", "least"])
def test_opcheck_of_tt_adapter(dtype, whole):
    x, dy = torch.randn(2, 3, 12).to(dtype), torch.randn(2, 3, 15).to(dtype)
    name = choose(x)
    down = random_cores(TINY_DOWN), TINY_DOWN.spec, torch.randn(4) if whole else None
    up = random_cores(TINY_UP), TINY_UP.spec, torch.randn(15) if whole else None
    trains = *down, *up, torch.ones(1) if whole else None
    residual, seed = (torch.randn(2, 3, 15), torch.tensor(3)) if whole else (None, None)
    options = (False, 1.0, "gelu", 0.25 if whole else 0.0)
    torch.library.opcheck(torch.ops.loretta.tt_adapter_fwd.default, (x, *trains, residual, seed, *options, name))
    needs = [whole, True, whole, True, whole, whole]
    torch.library.opcheck(
        torch.ops.loretta.tt_adapter_bwd.default,
        (dy, x, torch.randn(6, 3), *trains, seed, *options, needs, name),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@every_function
def test_compiles_whole_forward_and_backward(name, compiler):
    options = {} if name == "tt_linear" else {"dropout_p": 0.3, "seed": 5}
    function, problem = problem_of(name, (2, 5), torch.float32, **options)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    assert_equal(solve(compiled, problem), solve(function, problem), 0)


def test_compiles_whole_with_x_for_its_residual_and_a_seed_drawn_inside():
    down, up = TTShape((3, 2), (2,), 2), TTShape((2,), (2, 3), 2)
    problem = adapter_problem(down, up, (40,), torch.float32, dropout_p=0.5)
    compiled = torch.compile(tt_adapter, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first = solve(compiled, problem)
    torch.manual_seed(1)
    assert_equal(solve(compiled, problem), first, 0)
    assert not torch.equal(solve(compiled, problem)["y"], first["y"])


def test_compiles_whole_for_any_number_of_rows():
    compiled = torch.compile(tt_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 7, 30):
        problem = linear_problem(TINY_DOWN, (rows, 3), torch.float32)
        assert_equal(solve(compiled, problem), solve(tt_linear, problem), 0)


@pytest.mark.parametrize("residual", ["x", "another", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_x_and_the_waist_and_no_more(dtype, residual):
    down, up = TTShape.for_matrix(96, 8, 3), TTShape.for_matrix(8, 96, 3)
    problem = adapter_problem(down, up, (37,), dtype, residual=residual, dropout_p=0.2)
    assert kept(tt_adapter, problem) == [((37, 96), dtype), ((37, 3), torch.float32)]
    lora = lora_problem(down, up, (37,), dtype, residual=residual)
    assert kept(tt_lora, lora) == [((37, 96), dtype), ((37, 3), torch.float32)]
    linear = linear_problem(down, (37,), dtype)
    assert kept(tt_linear, linear) == [((37, 96), dtype), ((37, 3), torch.float32)]


def kept(function: Callable[..., Tensor], problem: Problem) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of what backward keeps, parameters and single numbers left out."""
    leaves = {name: None if t is None else t.requires_grad_() for name, t in problem.tensors.items()}
    arguments = leaves | problem.options
    if arguments.get("residual") == "x":
        arguments["residual"] = leaves["x"]
    parameters = {t.data_ptr() for name, t in leaves.items() if t is not None and name not in ("x", "residual")}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in parameters and tensor.numel() > 1:
            saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**arguments)
    return saved


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widens_no_more_than_a_block_of_rows_and_forms_no_matrix(dtype, dropout_p):
    from loretta_kernels._torch.rows import CPU_BLOCK

    N, I = 900, 768
    down, up = TTShape.for_matrix(I, 64, 5), TTShape.for_matrix(64, I, 5)
    assert N * I > 5 * CPU_BLOCK
    x, dy = torch.randn(N, I).to(dtype), torch.randn(N, I).to(dtype)
    seed = torch.tensor(3) if dropout_p else None
    trains = random_cores(down), down.spec, torch.zeros(64), random_cores(up), up.spec, torch.zeros(I), None
    options = True, 1.0, "relu", dropout_p
    with Recorder() as recorder:
        y, waist = _torch.tt_adapter_fwd(x, *trains, None, seed, *options)
        grads = _torch.tt_adapter_bwd(dy, x, waist, *trains, seed, *options, [True] * 5 + [False])
    given = {t.untyped_storage().data_ptr() for t in (x, dy, y, *grads) if t is not None}
    temporaries = [t for _, outs in recorder.calls for t in outs if t.untyped_storage().data_ptr() not in given]
    assert max(t.numel() for t in temporaries) <= CPU_BLOCK
    assert not [t.shape for t in temporaries if sorted(t.shape) == [64, I]]


PARAMETERS = ("x", "down", "down_bias", "up", "up_bias", "scale")


@pytest.mark.parametrize("wanted", [*PARAMETERS, "residual"])
def test_computes_the_gradient_that_is_wanted_and_no_other(wanted):
    problem = adapter_problem(TINY_DOWN, TINY_UP, (6,), torch.float64, residual="another", activation="tanh")
    everything = solve(tt_adapter, problem)
    leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in problem.tensors.items()}
    y = tt_adapter(**leaves | problem.options)
    with Recorder() as recorder:
        y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    assert torch.equal(leaves[wanted].grad, everything[f"d{wanted}"])
    computed = [grad.numel() > 0 for _, grads in recorder.ours() for grad in grads]
    assert computed == ([] if wanted == "residual" else [name == wanted for name in PARAMETERS])


@pytest.mark.parametrize("wanted", ["x", "cores", "bias"])
def test_tt_linear_computes_the_gradient_that_is_wanted_and_no_other(wanted):
    problem = linear_problem(TINY_DOWN, (6,), torch.float64)
    everything = solve(tt_linear, problem)
    leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in problem.tensors.items()}
    y = tt_linear(**leaves | problem.options)
    with Recorder() as recorder:
        y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    assert torch.equal(leaves[wanted].grad, everything[f"d{wanted}"])
    assert [g.numel() > 0 for _, grads in recorder.ours() for g in grads] == [
        n == wanted for n in ("x", "cores", "bias")
    ]


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_no_rows_give_an_empty_output_and_zero_gradients(name, dtype, lead):
    options = {} if name == "tt_linear" else {"dropout_p": 0.5}
    function, problem = problem_of(name, lead, dtype, **options)
    answers = solve(function, problem)
    assert answers["y"].shape[:-1] == lead
    assert answers["dx"].shape == (*lead, 12)
    assert all((answer == 0).all() for answer in answers.values())


@every_function
def test_tensors_of_meta_give_shapes(name):
    function, problem = problem_of(name, (2, 5), torch.float32, **({} if name == "tt_linear" else {"dropout_p": 0.5}))
    problem.tensors |= {key: None if t is None else t.to("meta") for key, t in problem.tensors.items()}
    with torch.device("meta"):
        answers = solve(function, problem)
    assert answers["y"].shape == (2, 5, 4 if name == "tt_linear" else 15)
    assert all(answer.is_meta for answer in answers.values())


LAYOUTS = {
    "every-other-row": lambda randn, N, M, I: randn(2 * N, M, I)[::2],
    "every-other-column": lambda randn, N, M, I: randn(N, M, 2 * I)[..., ::2],
    "leading-dimensions-swapped": lambda randn, N, M, I: randn(M, N, I).transpose(0, 1),
    "features-first": lambda randn, N, M, I: randn(I, N, M).permute(1, 2, 0),
    "a-dimension-of-one-with-a-stride-of-its-own": lambda randn, N, M, I: randn(1, N * M, I).transpose(0, 1),
    "one-row-repeated": lambda randn, N, M, I: randn(1, 1, I).expand(N, M, I),
    "reversed-storage-offset": lambda randn, N, M, I: randn(N * M * I + 5)[5:].view(N, M, I),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@every_function
def test_takes_any_strides(name, layout, dtype):
    function, problem = problem_of(name, (4, 3), dtype)
    randn = partial(torch.randn, dtype=dtype)
    strided = {"x": layout(randn, 4, 3, 12)}
    if "residual" in problem.tensors:
        strided["residual"] = layout(randn, 4, 3, 15)
    dy = layout(randn, 4, 3, 4 if name == "tt_linear" else 15)
    outcomes = []
    for prepare in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        views = {key: t.detach().requires_grad_() for key, t in strided.items()}
        arguments = problem.tensors | {key: prepare(view) for key, view in views.items()} | problem.options
        y = function(**arguments)
        outcomes.append((y, *torch.autograd.grad(y, list(views.values()), prepare(dy))))
    rtol = 1e-12 if dtype is torch.float64 else 1e-5
    for strided_outcome, contiguous_outcome in zip(*outcomes, strict=True):
        torch.testing.assert_close(strided_outcome, contiguous_outcome, rtol=rtol, atol=rtol / 100)


@every_function
def test_gradients_flow_through_a_view_of_x(name):
    function, problem = problem_of(name)
    base = torch.cat([torch.zeros(3, 12, dtype=torch.float64), problem.tensors["x"]]).requires_grad_()
    answers = solve(lambda x, **arguments: function(x=base[3:], **arguments), problem)
    assert "dx" not in answers
    assert torch.equal(base.grad[:3], torch.zeros(3, 12, dtype=torch.float64))
    assert torch.equal(base.grad[3:], solve(function, problem)["dx"])


@every_function
def test_the_output_may_be_changed_in_place(name):
    function, problem = problem_of(name, (2, 3))
    doubled = solve(lambda **arguments: function(**arguments).mul_(2), problem)
    assert_equal(doubled, solve(lambda **arguments: function(**arguments) * 2, problem), 0)


@every_function
def test_is_differentiable_once(name):
    function, problem = problem_of(name)
    x = problem.tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(function(**problem.tensors | problem.options).cos().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
