"""The kernels compute the operators: golden vectors, shapes of every kind, options, dropout, training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loretta_kernels
from loretta_kernels import ACTIVATIONS, TT, TTShape, backend, tt_adapter, tt_linear, tt_lora, tt_matrix
from loretta_kernels.selfcheck import check, exact_problem, random_problem
from tests.kernels.golden import ON_BOND, errors
from tests.kernels.problems import TINY_DOWN, TINY_UP, assert_equal, square, tiny_problem
from tests.kernels.test_dropout import emulated_mask
from tests.triton.conftest import ARCHITECTURES

pytest.importorskip("triton")

FP32_BAR = 1e-5  # that of the PyTorch path: the longest sums here, of 4096 products, lose some sqrt(4096) roundings
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
one_architecture = pytest.mark.parametrize("executor", ["sm_90"], indirect=True)
RESIDUALS = {"relu": "another", "silu": "none"}  # all activations and all residuals, but not each with each
every_activation_and_residual = pytest.mark.parametrize(
    ("activation", "residual"), [(each, RESIDUALS.get(each, "x")) for each in ACTIVATIONS]
)
SHAPES = {
    "three-modes": ("tt_adapter", (TTShape((8, 6, 5), (8, 3), 5), TTShape((3, 8), (5, 6, 8), 5)), 21),
    "four-modes-and-one": ("tt_adapter", (TTShape((5, 4, 6, 4), (8,), 2), TTShape((8,), (4, 6, 4, 5), 2)), 3),
    "rank-that-fills-a-tile": ("tt_adapter", square(160, 64, 16), 5),
    "prime-sizes": ("tt_adapter", square(23, 5, 2), 67),
    "bottleneck-of-one": ("tt_adapter", square(64, 1, 3), 40),
    "a-large-bottleneck": ("tt_adapter", (TTShape((6,), (9, 8, 4), 2), TTShape((9, 8, 4), (6,), 2)), 3),
    "two-blocks-of-bottleneck-and-a-rank-above-a-tile": ("tt_adapter", square(130, 96, 20), 9),
    "a-rank-per-bond": ("tt_adapter", (TTShape((3, 5, 7), (2, 3), (4, 2, 6, 3)), TTShape((6,), (105,), 3)), 9),
    "gains": ("tt_adapter", (TTShape((8, 8), (6,), 3, (2, -3)), TTShape((6,), (8, 8), 3, (1, 4))), 19),
    "classifier": ("tt_linear", (TTShape.for_matrix(240, 240, 5),), 7),
    "six-modes-a-side": ("tt_linear", (TTShape((2, 3, 2, 3, 2, 3), (2, 3, 2, 2, 3, 4), 3),), 20),
    "one-large-mode": ("tt_linear", (TTShape((521,), (2, 3), (4, 3)),), 70),
    "one-large-mode-on-the-way-out": ("tt_linear", (TTShape((2, 2), (1031,), (3, 4)),), 3),
    "all-of-one": ("tt_linear", (TTShape((1,), (1,), 1),), 2),
    "rank-64": ("tt_linear", (TTShape((6, 8), (6,), 64),), 5),
    "lora": ("tt_lora", square(256, 8, 5), 33),
    "lora-to-a-prime": ("tt_lora", (TTShape.for_matrix(256, 16, 8), TTShape.for_matrix(16, 97, 3)), 6),
}


def shapes_by_turns():
    """Every shape in one dtype on one architecture: compiling takes the time."""
    for index, (name, case) in enumerate(SHAPES.items()):
        arch, dtype = ARCHITECTURES[index % 2], DTYPES[index // 2 % 3]
        yield pytest.param(arch, *case, dtype, id=f"{arch}-{name}-{str(dtype).removeprefix('torch.')}")


def golden_paths():
    """Some of the vectors, and all of them in the slow tests."""
    quick = ("adp_768_b64_r5_relu", "tt_768to64_ranks_1_2_3_4_2_1")
    for path in ON_BOND:
        yield pytest.param(path, id=path.stem, marks=[] if path.stem in quick else pytest.mark.slow)


@pytest.mark.parametrize(("executor", "operator", "shapes", "rows", "dtype"), shapes_by_turns(), indirect=["executor"])
def test_any_shape(operator, shapes, rows, dtype):
    with backend("triton"):
        check(random_problem(operator, shapes, rows, dtype, activation="relu"), "triton")
        check(exact_problem(operator, shapes, rows, dtype, activation="relu"), "triton")


@pytest.mark.parametrize("path", golden_paths())
@one_architecture
def test_reproduces_the_golden_vectors(path):
    with backend("triton"):
        for name, error in errors(loretta_kernels, path, torch.float32).items():
            assert error <= FP32_BAR, name


@every_activation_and_residual
@one_architecture
def test_every_activation_and_residual(residual, activation):
    options = {"residual": residual, "activation": activation}
    with backend("triton"):
        check(random_problem("tt_adapter", square(96, 12, 3), (2, 35), torch.bfloat16, **options), "triton")


@every_activation_and_residual
@one_architecture
def test_what_is_not_a_number_stays_in_its_row(residual, activation):
    options = {"residual": residual, "activation": activation}
    problem = random_problem("tt_adapter", square(96, 12, 3), 70, torch.bfloat16, **options)
    problem.x[7, 3] = torch.nan
    with backend("triton"):
        answers = problem.solve()
    assert answers["y"].isnan().all(1).nonzero().tolist() == [[7]]
    for name in ("y", "dx"):
        assert answers[name][torch.arange(70) != 7].isfinite().all()
    assert answers["ddown"].isnan().any()


@pytest.mark.parametrize(("biases", "dtype"), [(False, torch.bfloat16), (True, torch.float16)], ids=str)
@one_architecture
def test_takes_parameters_in_the_dtype_of_x(biases, dtype):
    options = {"residual": "none", "biases": biases, "param_dtype": dtype}
    problem = random_problem("tt_adapter", (TINY_DOWN, TINY_UP), 40, dtype, **options)
    with backend("triton"):
        check(problem, "triton")
        assert {answer.dtype for answer in problem.solve().values()} == {dtype}


@pytest.mark.parametrize(
    ("p", "residual", "dtype"), [(0.1, "x", torch.float32), (0.7, "another", torch.bfloat16)], ids=str
)
@one_architecture
def test_dropout_draws_the_mask_that_every_backend_draws(p, residual, dtype):
    options = {"residual": residual, "activation": "gelu", "dropout_p": p}
    with backend("triton"):
        check(random_problem("tt_adapter", square(150, 8, 3), 70, dtype, **options), "triton")


@pytest.mark.parametrize("seed", [0, -4, 2**63 - 1, 123456789012])
def test_the_mask_is_the_emulated_one_for_every_bit_of_the_seed(seed):
    x = torch.ones(9, 150, requires_grad=True)
    shape, one = TTShape((150,), (1,), 1), TTShape((1,), (1,), 1)
    trains = TT(torch.ones(shape.num_params), shape), TT(torch.ones(2), one)
    with backend("triton"):
        tt_lora(x, *trains, dropout_p=0.4, seed=seed).sum().backward()
    assert torch.equal(x.grad > 0, emulated_mask(9, 150, 0.4, seed) > 0)


LAYOUTS = {
    "transposed": lambda N, I: torch.randn(I, N).t(),
    "every-second-row": lambda N, I: torch.randn(2 * N, I)[::2],
    "wide-rows": lambda N, I: torch.randn(N, 3 * I)[:, I : 2 * I],
    "one-row-repeated": lambda N, I: torch.randn(1, I).expand(N, I),
    "three-dimensions-cut": lambda N, I: torch.randn(2, N, I)[:, : N // 2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@one_architecture
def test_takes_any_strides(layout):
    problem = tiny_problem("tt_adapter", (12,), torch.float32)
    strided, dy = {"x": layout(12, 12), "residual": layout(12, 15)}, layout(12, 15)
    with backend("triton"):
        outcomes = []
        for prepare in (lambda t: t, lambda t: t.contiguous()):
            views = {name: t.detach().requires_grad_() for name, t in strided.items()}
            y = problem.with_tensors({name: prepare(t) for name, t in views.items()}).run()
            outcomes.append((y, *torch.autograd.grad(y, list(views.values()), prepare(dy))))
    for ours, contiguous in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, contiguous, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("executor", "rows"), [("sm_80", 9), ("sm_90", 300)], indirect=["executor"])
def test_deterministic_sums_are_the_same_bits_in_every_schedule(rows):
    problem = random_problem("tt_adapter", square(96, 12, 3), rows, torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with backend("triton"):
        first = problem.solve()
        for _ in range(3):
            assert_equal(problem.solve(), first, 0)
        check(problem, "triton")


@one_architecture
def test_the_same_buffers_serve_a_second_run():
    """As a CUDA graph's replay: what a run leaves behind must not be in the next one's way."""
    problem = random_problem("tt_adapter", square(96, 12, 3), 70, torch.float32)
    with backend("triton"):
        check(problem, "triton", runs=3)


@pytest.mark.parametrize("operator", ["tt_linear", "tt_adapter"])
@one_architecture
def test_compiles_whole_forward_and_backward(operator):
    torch.compiler.reset()

    class Compiled:
        def __getattr__(self, name):
            return torch.compile(getattr(loretta_kernels, name), fullgraph=True, backend="aot_eager")

    torch.use_deterministic_algorithms(True, warn_only=True)
    problem = tiny_problem(operator, (5,), torch.float32)
    with backend("triton"):
        assert_equal(problem.solve(Compiled()), problem.solve(), 0)


@one_architecture
def test_fp64_is_refused_where_the_kernels_are_forced():
    with backend("triton"), pytest.raises(RuntimeError, match="cannot serve: the kernels compute in fp32"):
        tiny_problem("tt_linear").run()


@one_architecture
def test_a_frozen_train_gives_the_same_bits():
    problem = tiny_problem("tt_linear", (30,), torch.float32)
    with backend("triton"):
        assert torch.equal(problem.solve()["y"], tt_linear(problem.x, problem.down))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@one_architecture
def test_the_gradient_of_the_scale_sees_parameters_that_x_s_dtype_would_round(dtype):
    """All but the last core are whole numbers, so that its rounding to 16 bits would be the only error."""
    torch.manual_seed(0)
    down, up = TTShape([4, 4], [8], 3), TTShape([8], [16], 3)

    def whole(*size):
        return torch.randint(-2, 3, size).float()

    x, cores_down = whole(5, 16).to(dtype), whole(down.num_params)
    cores_up = torch.cat([whole(24), torch.randn(48)])
    scale, dy = torch.ones((), requires_grad=True), whole(5, 16).to(dtype)
    trains = TT(cores_down, down), TT(cores_up, up)
    with backend("triton"):
        y = tt_adapter(x, *trains, activation="identity", scale=scale)
        (dscale,) = torch.autograd.grad(y, scale, dy)
    exact = x.double() @ tt_matrix(trains[0]).double() @ tt_matrix(replace(trains[1], cores=cores_up.double()))
    summands = exact * dy.double()
    assert abs(dscale - summands.sum()) <= 1e-5 * summands.norm()


@one_architecture
def test_tf32_rounds_to_nearest_and_the_gradient_of_a_bias_not_at_all():
    """Whole numbers that 16 bits hold, but whose products need more bits than the 11 of tf32."""
    down, up = TTShape((16,), (16,), 1), TTShape((16,), (16,), 1)
    x, dy = torch.zeros(1, 16, dtype=torch.bfloat16), torch.full((1, 16), 128.0, dtype=torch.bfloat16)
    x[0, 0], dy[0, 0] = 1, 121  # so that dz = 121 + 15 · 128 = 2041
    cores_down, cores_up = torch.ones(32).requires_grad_(), torch.ones(32)
    cores_up[:16] = 3  # so that da = 6123, which tf32 rounds to 6124 and cuts to 6120
    bias = torch.zeros(16, requires_grad=True)
    with backend("triton"):
        y = tt_adapter(x, TT(cores_down, down, bias), TT(cores_up, up), activation="identity")
        dbias, dcores = torch.autograd.grad(y, (bias, cores_down), dy)
    assert dbias.tolist() == [6123] * 16
    assert dcores[16:].tolist() == [6124] * 16
