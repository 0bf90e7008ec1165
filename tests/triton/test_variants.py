"""A launch like an earlier one calls what was compiled then; another one asks Triton again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loretta_kernels import TTShape

pytest.importorskip("triton")
from triton.compiler import ASTSource

from loretta_kernels._triton import side
from loretta_kernels._triton.launch import Variant
from loretta_kernels._triton.planned import planned


class Kernel:
    """As much of a `triton.jit` function as a variant uses; it compiles by counting."""

    arg_names = ("x_ptr", "bias_ptr", "N", "scale", "BLOCK", "FLAG")
    __name__ = "kernel"

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile(**arguments: Any) -> Any:
            self.compiled.append(arguments)
            return Compiled(self)

        return compile


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values: self.kernel.launched.append((grid, *values))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def variant(kernel: Kernel) -> Variant:
    return Variant(kernel, {"FLAG": True, "BLOCK": 64}, 4, 2)


X = torch.zeros(64)
CALL = {"x_ptr": X, "N": 3, "scale": 2.0}


def test_the_second_launch_calls_what_the_first_compiled(kernel, variant):
    other = torch.zeros(32)
    variant((2,), CALL, 0)
    variant((5, 3), CALL | {"x_ptr": other, "N": 7, "scale": 1.0}, 0)
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0] == CALL | {"FLAG": True, "BLOCK": 64, "num_warps": 4, "num_stages": 2}
    [(grid, x, bias, N, scale, block, flag)] = kernel.launched
    assert (grid, x is other, bias, N, scale, block, flag) == ((5, 3, 1), True, None, 7, 1.0, 64, True)


@pytest.mark.parametrize(
    "change",
    [
        {"x_ptr": X[1:]},
        {"x_ptr": X.bfloat16()},
        {"bias_ptr": X},
        {"N": 1},
        {"N": 32},
        {"N": 2**31 + 1},
    ],
    ids=["not aligned", "another dtype", "another operand", "one", "divisible by 16", "64 bits"],
)
def test_what_triton_specialises_on_is_compiled_anew(kernel, variant, change):
    variant((2,), CALL, 0)
    variant((2,), CALL | change, 0)
    assert len(kernel.compiled) == 2


def test_each_device_has_its_own(kernel, variant):
    variant((2,), CALL, 0)
    variant((2,), CALL, 1)
    assert len(kernel.compiled) == 2


def test_constants_must_come_last(kernel):
    with pytest.raises(ValueError, match="the last arguments of kernel must be scale"):
        Variant(kernel, {"scale": 1.0}, 4, 2)


def test_kernels_on_disk_are_of_the_code_that_plans_them(monkeypatch):
    """Triton keeps them by the constants' text: what is derived from a side's fields must be in it."""

    def keys():
        launches = planned("tt_adapter", (TTShape.for_matrix(256, 8, 3), TTShape.for_matrix(8, 256, 3)), N=70)
        return [ASTSource(**record.source()).hash() for record in launches]

    before = keys()
    assert keys() == before
    digest = side._digest_of
    monkeypatch.setattr(side, "_digest_of", lambda modules: digest(modules)[::-1])
    assert not set(keys()) & set(before)
    assert digest(("loretta_kernels._triton.row_side",)) != digest(("loretta_kernels._triton.side",))
