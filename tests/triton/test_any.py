"""Random cases: trains, options and rows drawn, each in three schedules."""

from __future__ import annotations

import os
from math import prod
from random import Random

import pytest
import torch

from loretta_kernels import ACTIVATIONS, TTShape, backend
from loretta_kernels.selfcheck import check, random_problem
from tests.kernels.problems import OPERATORS
from tests.triton.conftest import ARCHITECTURES

pytest.importorskip("triton")

CASES = int(os.environ.get("LORETTA_TEST_CASES", 300))
# Of each train that is drawn: compiling is what takes time.
ROWS = (
    1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 67, 80, 96, 100, 127, 128, 131, 140,
)  # fmt: skip
SCHEDULES = 3
LARGEST = 200  # features: several blocks, and still quick


def modes(random: Random, largest: int = LARGEST) -> list[int]:
    """One to four modes, whose product is not too large."""
    drawn = [random.randint(1, 7) for _ in range(random.randint(1, 4))]
    while prod(drawn) > largest:
        drawn.pop()
    return drawn


def train(random: Random, i: list[int], o: list[int]) -> TTShape:
    """A train of these modes, with a rank of its own at every bond."""
    gains = (random.randint(-2, 2), random.randint(-2, 2)) if random.random() < 0.3 else (0, 0)
    return TTShape(i, o, [random.randint(1, 6) for _ in range(len(i) + len(o) - 1)], gains)


@pytest.mark.parametrize(
    ("executor", "number"),
    [(ARCHITECTURES[number % 2], number) for number in range(max(1, CASES // len(ROWS)))],
    indirect=["executor"],
)
def test_any_trains(number):
    random = Random(number)
    operator = random.choice(OPERATORS)
    bottleneck = modes(random, 64)
    shapes = [train(random, modes(random), bottleneck)]
    options = {}
    if operator != "tt_linear":
        shapes.append(train(random, bottleneck[::-1], modes(random)))
        options = {"residual": random.choice(["another", "none"]), "dropout_p": random.choice([0.0, 0.0, 0.3])}
        options["scale"] = random.choice([None, 1.0])
    if operator != "tt_lora":
        options["biases"] = random.random() < 0.6
    if operator == "tt_adapter":
        options["activation"] = random.choice(ACTIVATIONS)
    dtype = random.choice([torch.float32, torch.bfloat16, torch.float16])
    with backend("triton"):
        for rows in ROWS:
            check(random_problem(operator, shapes, rows, dtype, seed=rows, **options), "triton", runs=SCHEDULES)
