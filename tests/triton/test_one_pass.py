"""The kernels that keep whole rows on the chip: what they serve, and that they compute the operators."""

from __future__ import annotations

import os
from math import prod
from random import Random

import pytest
import torch

from bench.classes import FIRST_RATE
from loretta_kernels import ACTIVATIONS, TT, TTShape, _torch, backend, tt_adapter
from loretta_kernels.call import Call
from loretta_kernels.philox import random_bits, threshold
from loretta_kernels.selfcheck import check, exact_problem, random_problem
from tests.kernels.problems import OPERATORS, square
from tests.triton.test_any import SCHEDULES, train

pytest.importorskip("triton")
import triton
import triton.language as tl

from loretta_kernels._triton import adapter, launch
from loretta_kernels._triton.launch import Launch, Variant
from loretta_kernels._triton.one_pass_kernel import kept_of_block
from loretta_kernels._triton.plan import plan_of
from loretta_kernels._triton.planned import planned

CASES = int(os.environ.get("LORETTA_TEST_CASES", 300))
ROWS = (1, 7, 16, 67)
pytestmark = pytest.mark.parametrize("executor", ["sm_90"], indirect=True)
SAME_MATRIX = TTShape((4, 4, 8), (2, 4), 3, (1, -2)), TTShape((4, 2), (4, 4, 8), (3, 2, 4, 5), (0, 3))
LINEAR = (TTShape((4, 8, 8), (8, 4, 8), (3, 4, 5, 2, 3)),)
WIDE = TTShape((4, 4, 8), (4, 8), 3), TTShape((8, 4), (4, 4, 8), 3)
OTHER_MATRIX = TTShape((3, 2, 24), (6,), (4, 2, 3)), TTShape((6,), (9, 16), (2, 3))
LONG = TTShape((24, 16), (6,), (4, 3)), TTShape((6,), (9, 32), (2, 3))  # one program on a multiprocessor
LONGER = TTShape((64, 16), (6,), (4, 3)), TTShape((6,), (16, 32), (2, 3))  # with dropout two


def one_pass(*shapes):
    """The plan of the form for rows of 16 bits."""
    return plan_of(shapes[0], shapes[1] if len(shapes) > 1 else None, 2, "sm_90").one_pass


def one_pass_backward(*shapes, residual="another", dropout_p=0.0):
    """That of its backward."""
    up = shapes[1] if len(shapes) > 1 else None
    return plan_of(shapes[0], up, 2, "sm_90", residual == "x", dropout_p > 0).one_pass_backward


def in_one_pass(random):
    """An operator and its trains, drawn until the form serves them."""
    while True:
        operator = random.choice(OPERATORS)
        middle = [random.choice((1, 2, 3, 4, 8)) for _ in range(random.randint(1, 3))]
        into, out = ([random.choice((2, 3, 4, 5, 8, 12, 16)) for _ in range(random.randint(2, 4))] for _ in range(2))
        shapes = [train(random, into, out if operator == "tt_linear" else middle)]
        if operator != "tt_linear":
            shapes.append(train(random, middle[::-1], into if random.random() < 0.4 else out))
        if max(prod(into), prod(out)) <= 2048 and prod(middle) <= 128 and one_pass(*shapes):
            return operator, shapes


@pytest.mark.parametrize("number", range(max(1, CASES // 30)))
def test_any_trains(number, monkeypatch):
    monkeypatch.setattr(adapter, "multiprocessors", lambda device: 3)  # which have more than one block of 67 rows
    random = Random(number)
    operator, shapes = in_one_pass(random)
    options = {}
    if operator != "tt_linear":
        options = {"residual": random.choice(["another", "none"]), "dropout_p": random.choice([0.0, 0.0, 0.3])}
        options["scale"] = random.choice([None, 1.0, 0.5])
        if operator == "tt_adapter" and shapes[0].in_features == shapes[1].out_features:
            options["residual"] = "x"
    if operator != "tt_lora":
        options["biases"] = random.random() < 0.7
    if operator == "tt_adapter":
        options["activation"] = random.choice(ACTIVATIONS)
    dtype = random.choice([torch.bfloat16, torch.float16])
    kind = {name: options[name] for name in ("residual", "dropout_p") if name in options}
    is_streamed = not one_pass_backward(*shapes, **kind) or options.get("scale", 1.0) is None
    if number % 5 and is_streamed:  # a backward that is no other here, and takes long to compile
        monkeypatch.setattr(adapter, "backward", _torch.backward)
    with backend("triton"):
        for rows in ROWS:
            check(random_problem(operator, shapes, rows, dtype, seed=rows, **options), "triton", runs=SCHEDULES)


@pytest.mark.parametrize(
    ("shapes", "residents"),
    [(SAME_MATRIX, {2}), (OTHER_MATRIX, {2}), (LONG, {1}), (LONGER, {1, 2})],
    ids=["same-matrix", "other-matrix", "long-rows", "longer-rows"],
)
def test_exact_numbers_stay_exact_with_few_programs(shapes, residents, monkeypatch, executor):
    """Few programs, so that each takes several blocks of rows."""
    monkeypatch.setattr(adapter, "multiprocessors", lambda device: 3)
    residual = "x" if shapes is SAME_MATRIX else "another"
    with backend("triton"):
        for dtype in (torch.bfloat16, torch.float16):
            check(exact_problem("tt_adapter", shapes, 131, dtype, residual=residual, scale=0.5), "triton")
        check(exact_problem("tt_adapter", shapes, 131, dtype, residual=residual, scale=0.5, dropout_p=0.5), "triton")
    one_pass = {(launch.kernel, launch.grid) for launch in executor.launches if "one_pass" in launch.kernel}
    backward = {("_one_pass_backward_kernel", (3 * resident, 1, 1)) for resident in residents}
    assert one_pass == {("_one_pass_forward_kernel", (3, 1, 1))} | backward


def test_lanes_that_share_a_sum_agree_on_it():
    """Of two rows and two outer indices there are fewer sums than lanes; the executor sees any that differ."""
    shapes = TTShape((3, 16, 8, 5), (2,), (3, 1, 3, 4)), TTShape((2,), (2, 12, 16, 2), (4, 6, 4, 4))
    form = plan_of(*shapes, 2, "sm_90").one_pass_few
    assert (form.n, form.sides[-1].OP) == (2, 2)
    with backend("triton"):
        check(random_problem("tt_lora", shapes, 7, torch.bfloat16), "triton")


def test_few_rows_of_many_outer_indices_go_one_by_one():
    shapes = TTShape((128, 16), (4,), (4, 3)), TTShape((4,), (4, 16), (2, 3))
    assert plan_of(*shapes, 2, "sm_90").one_pass_few.n == 1
    with backend("triton"):
        check(random_problem("tt_lora", shapes, 5, torch.bfloat16, dropout_p=0.3), "triton")


def test_serves_the_rows_of_16_bits_of_small_ranks():
    served = {case.name for case in FIRST_RATE if one_pass(*case.shapes)}
    assert served == {case.name for case in FIRST_RATE} - {"adp 4096x64x16", "cls 1024 5"}
    residuals = {"tt_adapter": "x"}
    assert served - {
        case.name
        for case in FIRST_RATE
        if one_pass_backward(*case.shapes, residual=residuals.get(case.operator, "none"))
    } == {
        *("adp 3584x64x5", "adp 4096x64x8", "adp 5120x64x8", "adp 8192x64x5"),
        *("rep 4096→4096 16 8", "rep 4096→14336 8 5"),
    }
    down, up = square(4096, 64, 5)
    assert plan_of(down, up, 4, "sm_90").one_pass is None
    assert plan_of(down, up, 2, "sm_80").one_pass is None
    assert one_pass(*square(4096, 64, 9)) is None
    assert one_pass(*square(4096, 256, 5)) is None
    assert one_pass(TTShape((5, 15), (8,), 2)) is None  # 15 features are not 16 bytes apart


@pytest.mark.parametrize(
    ("rows", "programs", "warps"), [(1, 1, 4), (4, 1, 4), (5, 2, 4), (528, 132, 4), (529, 67, 8), (8192, 132, 8)]
)
def test_makes_tables_once_on_a_multiprocessor(rows, programs, warps):
    forward, _ = planned("tt_adapter", square(4096, 64, 5), N=rows)
    assert (forward.grid, forward.options()["num_warps"]) == ((programs,), warps)
    assert forward.constants["KEEPS_X"]


@pytest.mark.parametrize(("rows", "programs"), [(1, 1), (4, 1), (5, 2), (8192, 132)])
def test_sums_once_on_a_multiprocessor(rows, programs):
    _, backward = planned("tt_adapter", square(4096, 64, 5), N=rows)
    assert backward.grid == (programs,)
    assert backward.constants["KEEPS_DY"]


@pytest.mark.parametrize(("rows", "programs"), [(1, 1), (4, 1), (5, 2), (1056, 264), (8192, 264)])
def test_short_rows_have_two_programs_on_a_multiprocessor(rows, programs):
    shapes = TTShape.for_matrix(768, 8, rank=5), TTShape.for_matrix(8, 768, rank=5)
    for dropout_p in (0.0, 0.05):
        _, backward = planned("tt_lora", shapes, N=rows, dropout_p=dropout_p)
        assert (backward.grid, backward.options()["num_warps"]) == ((programs,), 4)


def test_a_row_that_is_not_a_number_stays_alone():
    problem = random_problem("tt_adapter", SAME_MATRIX, 37, torch.bfloat16)
    problem.x[7, 3] = torch.nan
    with backend("triton"):
        y = problem.run()
    assert y.isnan().all(1).nonzero().tolist() == [[7]]


def test_a_gradient_that_is_not_finite_stays_alone():
    problem = random_problem("tt_adapter", SAME_MATRIX, 37, torch.bfloat16, scale=1.0)
    problem.dy[7, 3] = torch.inf
    with backend("triton"):
        dx = problem.solve()["dx"]
    assert (~dx.isfinite()).any(1).nonzero().tolist() == [[7]]


def test_the_bias_is_not_rounded():
    """What 16 bits lose of it is seen where the residual takes the rest away."""
    trains = [TT(torch.zeros(shape.num_params), shape) for shape in SAME_MATRIX]
    trains[1] = TT(trains[1].cores, trains[1].shape, torch.full((128,), 1 + 2.0**-12))
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    with backend("triton"):
        y = tt_adapter(x, *trains, residual=torch.full_like(x, -1))
    assert (y == 2.0**-12).all()


def test_what_goes_into_the_last_product_is_not_rounded():
    """The outer factor has 257, which 16 bits would make 256, and the residual takes that away."""
    down, up = TTShape((4, 4, 8), (1,), 1), TTShape((1,), (4, 4, 8), 1)
    cores = torch.ones(up.num_params)
    cores[1:5] = 257
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    x[:, 0] = 1
    trains = TT(torch.ones(down.num_params), down), TT(cores, up)
    with backend("triton"):
        y = tt_adapter(x, *trains, activation="identity", residual=torch.full_like(x, -256))
    assert (y == 1).all()


def test_rows_are_read_once(executor):
    executor.timing = True
    problem = random_problem("tt_adapter", SAME_MATRIX, 37, torch.bfloat16, scale=1.0)
    with backend("triton"):
        problem.solve()
    forward, backward = (launch.traffic for launch in executor.launches)
    for moved in (forward["x_ptr"], backward["x_ptr"], backward["dy_ptr"]):
        assert (moved["read"] + moved["copied"]) * 32 == problem.x.nbytes
    assert backward["dx_ptr"]["written"] * 32 == problem.x.nbytes


def kernels_of(problem, executor):
    """The kernels of a training step by their names."""
    with backend("triton"):
        problem.solve()
    return [launch.kernel.strip("_").removesuffix("_kernel") for launch in executor.launches]


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_backward_is_one_launch(operator, executor):
    shapes = LINEAR if operator == "tt_linear" else SAME_MATRIX
    dropout_p = 0.0 if operator == "tt_linear" else 0.5
    problem = random_problem(operator, shapes, 5, torch.bfloat16, scale=1.0, dropout_p=dropout_p)
    assert kernels_of(problem, executor) == ["one_pass_forward", "one_pass_backward"]


@pytest.mark.parametrize(
    ("shapes", "options", "deterministic"),
    [(SAME_MATRIX, {}, False), (WIDE, {"dropout_p": 0.1, "scale": 1.0}, False), (SAME_MATRIX, {"scale": 1.0}, True)],
    ids=["learnt-scale", "dropout", "deterministic"],
)
def test_what_the_backward_streams(shapes, options, deterministic, executor):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    names = kernels_of(random_problem("tt_adapter", shapes, 5, torch.bfloat16, **options), executor)
    assert names == ["one_pass_forward", "backward", *(["sum"] if deterministic else [])]


@pytest.mark.parametrize("stride", [2**28 - 8, 2**28])
def test_rows_far_from_each_other_are_streamed(stride):
    """Eight rows ahead, 32 bits do not hold such an address."""
    x = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided((9, 128), (stride, 1))
    down, up = (torch.empty(shape.num_params, device="meta") for shape in SAME_MATRIX)
    call = Call(x, down, None, up, None, None, None, None, None, *SAME_MATRIX, residual_is_x=True)
    waist, dy = torch.empty(9, 3, device="meta"), torch.empty(9, 128, dtype=torch.bfloat16, device="meta")
    with launch.recorded() as launches:
        adapter.backward(call, waist, dy, (True, True, False, True, False, False))
    served = "_one_pass_backward_kernel" if stride < 2**28 else "_backward_kernel"
    assert [each.kernel.__name__ for each in launches] == [served]


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_needs_no_gradient_changes_no_other(operator):
    """Every number is exact, so that sums in any order are equal."""
    problem = exact_problem(operator, LINEAR if operator == "tt_linear" else OTHER_MATRIX, 5, torch.bfloat16, scale=1.0)
    with backend("triton"):
        answers = problem.solve()
        for name, tensor in problem.tensors.items():
            leaf = tensor.clone().requires_grad_()
            y = problem.with_tensors({name: leaf}).run()
            assert torch.equal(torch.autograd.grad(y, leaf, problem.dy)[0], answers[f"d{name}"]), name


@pytest.mark.parametrize("layout", ["every-second-row", "wide-rows", "one-row-repeated", "transposed"])
def test_takes_any_strides(layout):
    problem = random_problem("tt_adapter", OTHER_MATRIX, 37, torch.bfloat16, residual="another")
    views = {
        "every-second-row": lambda t: t.repeat_interleave(2, 0)[::2],
        "wide-rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "one-row-repeated": lambda t: t[:1].expand(37, -1),
        "transposed": lambda t: t.t().contiguous().t(),
    }
    view = {name: views[layout](problem.tensors[name]) for name in ("x", "residual")}
    with backend("triton"):
        y = problem.with_tensors(view).run()
        assert torch.equal(y, problem.with_tensors({name: t.contiguous() for name, t in view.items()}).run())


@triton.jit
def _kept_kernel(kept_ptr, seed_ptr, first, DROPPED: tl.constexpr):
    n, c = tl.arange(0, 16), tl.arange(0, 32)
    kept = kept_of_block(seed_ptr, tl.cast(first, tl.int64), n, 0, DROPPED, 32)
    tl.store(kept_ptr + n[:, None] * 32 + c[None, :], kept.to(tl.int32))


@pytest.mark.parametrize("first", [32, 2**32 - 16, 2**33 + 16])
def test_rows_beyond_32_bits_have_masks_of_their_own(first):
    seed, kept = torch.tensor([5]), torch.empty(16, 32, dtype=torch.int32)
    dropped = threshold(0.3)
    variant = Variant(_kept_kernel, {"DROPPED": dropped}, num_warps=4, num_stages=1)
    launch.execute(Launch(variant, (1,), {"kept_ptr": kept, "seed_ptr": seed, "first": first}))
    assert torch.equal(kept.bool(), random_bits(seed, first, 16, 32) >= dropped)
