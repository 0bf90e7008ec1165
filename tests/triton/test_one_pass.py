"""The forward that keeps whole rows on the chip: what it serves, and that it computes the operators."""

from __future__ import annotations

import os
from math import prod
from random import Random

import pytest
import torch

from bench.classes import FIRST_RATE
from loretta_kernels import ACTIVATIONS, TT, TTShape, _torch, _triton, backend, tt_adapter
from loretta_kernels.selfcheck import check, exact_problem, random_problem
from tests.kernels.problems import OPERATORS, square
from tests.triton.test_any import SCHEDULES, train

pytest.importorskip("triton")
from loretta_kernels._triton import adapter
from loretta_kernels._triton.plan import plan_of
from loretta_kernels._triton.planned import planned

CASES = int(os.environ.get("LORETTA_TEST_CASES", 300))
ROWS = (1, 7, 16, 67)
pytestmark = pytest.mark.parametrize("executor", ["sm_90"], indirect=True)
SAME_MATRIX = TTShape((4, 4, 8), (2, 4), 3, (1, -2)), TTShape((4, 2), (4, 4, 8), (3, 2, 4, 5), (0, 3))
OTHER_MATRIX = TTShape((3, 2, 24), (6,), (4, 2, 3)), TTShape((6,), (9, 16), (2, 3))


def one_pass(*shapes):
    """The plan of the form for rows of 16 bits."""
    return plan_of(shapes[0], shapes[1] if len(shapes) > 1 else None, 2, "sm_90").one_pass


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


def answering_by_pytorch(monkeypatch):
    """The backward from the forward's waist by PyTorch: the kernel's, which is no other here, takes long to compile."""
    monkeypatch.setattr(_triton, "backward", _torch.backward, raising=False)


@pytest.mark.parametrize("number", range(max(1, CASES // 30)))
def test_any_trains(number, monkeypatch):
    if number % 5:
        answering_by_pytorch(monkeypatch)
    random = Random(number)
    operator, shapes = in_one_pass(random)
    options = {}
    if operator != "tt_linear":
        options = {"residual": random.choice(["another", "none"]), "dropout_p": random.choice([0.0, 0.0, 0.3])}
        options["scale"] = random.choice([None, 1.0])
        if operator == "tt_adapter" and shapes[0].in_features == shapes[1].out_features:
            options["residual"] = "x"
    if operator != "tt_lora":
        options["biases"] = random.random() < 0.7
    if operator == "tt_adapter":
        options["activation"] = random.choice(ACTIVATIONS)
    dtype = random.choice([torch.bfloat16, torch.float16])
    with backend("triton"):
        for rows in ROWS:
            check(random_problem(operator, shapes, rows, dtype, seed=rows, **options), "triton", runs=SCHEDULES)


@pytest.mark.parametrize("shapes", [SAME_MATRIX, OTHER_MATRIX], ids=["same-matrix", "other-matrix"])
def test_exact_numbers_stay_exact_with_few_programs(shapes, monkeypatch, executor):
    """Few programs, so that each takes several blocks of rows."""
    monkeypatch.setattr(adapter, "multiprocessors", lambda device: 3)
    answering_by_pytorch(monkeypatch)
    residual = "x" if shapes is SAME_MATRIX else "another"
    with backend("triton"):
        for dtype in (torch.bfloat16, torch.float16):
            check(exact_problem("tt_adapter", shapes, 131, dtype, residual=residual), "triton")
            check(random_problem("tt_adapter", shapes, 131, dtype, residual=residual, dropout_p=0.4), "triton")
    assert {launch.grid for launch in executor.launches if "one_pass" in launch.kernel} == {(3, 1, 1)}


def test_serves_the_rows_of_16_bits_of_small_ranks():
    served = {case.name for case in FIRST_RATE if one_pass(*case.shapes)}
    assert served == {case.name for case in FIRST_RATE} - {"adp 4096x64x16", "cls 1024 5"}
    down, up = square(4096, 64, 5)
    assert plan_of(down, up, 4, "sm_90").one_pass is None
    assert plan_of(down, up, 2, "sm_80").one_pass is None
    assert one_pass(*square(4096, 64, 9)) is None
    assert one_pass(*square(4096, 256, 5)) is None
    assert one_pass(TTShape((5, 15), (8,), 2)) is None  # 15 features are not 16 bytes apart


@pytest.mark.parametrize(("rows", "programs"), [(1, 1), (8, 1), (9, 2), (8192, 132)])
def test_makes_tables_once_on_a_multiprocessor(rows, programs):
    forward, _ = planned("tt_adapter", square(4096, 64, 5), N=rows)
    assert forward.grid == (programs,)
    assert forward.constants["KEEPS_X"]


def test_a_row_that_is_not_a_number_stays_alone():
    problem = random_problem("tt_adapter", SAME_MATRIX, 37, torch.bfloat16)
    problem.x[7, 3] = torch.nan
    with backend("triton"):
        y = problem.run()
    assert y.isnan().all(1).nonzero().tolist() == [[7]]


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


def test_x_is_read_once(executor):
    executor.timing = True
    problem = random_problem("tt_adapter", SAME_MATRIX, 37, torch.bfloat16)
    with backend("triton"):
        problem.run()
    moved = executor.launches[0].traffic["x_ptr"]
    assert (moved["read"] + moved["copied"]) * 32 == problem.x.nbytes


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
