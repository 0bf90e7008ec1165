"""Random problems for the operators, and the one rule by which an answer is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from loretta_kernels import TTShape
from loretta_kernels._dispatch import choose
from loretta_kernels.selfcheck.errors import FP32_ROUNDINGS

FP64_BAR = 1e-12
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A call in a process of its own, which prints [[2.0, 2.0]].
CALL = """
import torch
from loretta_kernels import TTShape, tt_linear
shape = TTShape((2,), (2,), 1)
print(tt_linear(torch.ones(1, 2), torch.ones(shape.num_params), shape).tolist())
"""
TINY_DOWN, TINY_UP = TTShape((3, 4), (2, 2), (2, 3, 2)), TTShape((2, 2), (5, 3), (2, 3, 2))


@dataclass
class Problem:
    """An operator's tensors by name, its arguments that are not tensors, and the dtype that holds dy exactly."""

    tensors: dict[str, Tensor | None]
    options: dict[str, object]
    dy_dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values with every tensor in `dtype`."""
        return Problem(
            {name: None if t is None else t.to(dtype) for name, t in self.tensors.items()}, self.options, self.dy_dtype
        )


Answers = dict[str, Tensor]


def random_cores(shape: TTShape, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cores whose matrix maps unit-sized features to unit-sized features."""
    paths = prod(shape.ranks)
    std = (1 / (paths * shape.in_features)) ** (0.5 / len(shape.modes))
    return (torch.randn(shape.num_params) * std).to(dtype)


def solve(function: Callable[..., Tensor], problem: Problem) -> Answers:
    """The output y and the gradient of every tensor, for a fixed dy; `residual="x"` means x itself."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.tensors.items() if t is not None}
    arguments = {name: leaves.get(name) for name in problem.tensors} | problem.options
    if arguments.get("residual") == "x":
        arguments["residual"] = leaves["x"]
    y = function(**arguments)
    y.backward(output_grad(y, problem))
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}


def output_grad(y: Tensor, problem: Problem) -> Tensor:
    """The fixed dy of an output."""
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
    return dy.to(problem.dy_dtype).to(y.dtype)


def error(answer: Tensor, truth: Tensor) -> float:
    """The relative error of a whole tensor, in fp64."""
    assert answer.shape == truth.shape, (answer.shape, truth.shape)
    difference, size = (answer.double() - truth.double()).norm().item(), truth.double().norm().item()
    return difference / size if size else difference


def assert_as_good_as_plain(ours: Answers, plain: Answers, truth: Answers, chains: int = 1) -> None:
    """At most twice the error of plain PyTorch, or what rounding costs: the answer, and chains of fp32 products."""
    assert ours.keys() == truth.keys() == plain.keys()
    for name, answer in ours.items():
        rounding = torch.finfo(answer.dtype).eps + chains * FP32_ROUNDINGS * torch.finfo(torch.float32).eps
        if answer.dtype is torch.float64:
            rounding = FP64_BAR
        if answer.numel() == 1:  # a sum that may cancel, with no other elements to average the luck over
            rounding *= 10
        allowed = max(2 * error(plain[name], truth[name]), rounding)
        assert error(answer, truth[name]) <= allowed, f"{name}: {error(answer, truth[name]):.2e} > {allowed:.2e}"


def assert_equal(ours: Answers, others: Answers, relative: float) -> None:
    """Every answer within this relative error of the other; 0 means the same bits."""
    assert ours.keys() == others.keys()
    for name, answer in ours.items():
        assert error(answer, others[name]) <= relative, f"{name}: {error(answer, others[name]):.2e}"


def linear_problem(shape: TTShape, lead: Sequence[int], dtype: torch.dtype, bias: bool = True) -> Problem:
    """Arguments of `tt_linear`: x in `dtype`, fp32 cores (fp64 for fp64)."""
    wide = torch.promote_types(dtype, torch.float32)
    return Problem(
        {
            "x": torch.randn(*lead, shape.in_features).to(dtype),
            "cores": random_cores(shape, wide),
            "bias": torch.randn(shape.out_features, dtype=wide) if bias else None,
        },
        {"shape": shape},
        dtype,
    )


def adapter_problem(
    down_shape: TTShape,
    up_shape: TTShape,
    lead: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: str = "x",
    biases: bool = True,
    **options: object,
) -> Problem:
    """Arguments of `tt_adapter`: x in `dtype`, fp32 parameters (fp64 for fp64); residual "x", "another" or "none"."""
    wide = torch.promote_types(dtype, torch.float32)
    I, B, O = down_shape.in_features, down_shape.out_features, up_shape.out_features
    tensors = {
        "x": torch.randn(*lead, I).to(dtype),
        "down": random_cores(down_shape, wide),
        "down_bias": torch.randn(B, dtype=wide) if biases else None,
        "up": random_cores(up_shape, wide),
        "up_bias": torch.randn(O, dtype=wide) if biases else None,
        "scale": torch.tensor(0.7, dtype=wide),
    }
    options |= {"down_shape": down_shape, "up_shape": up_shape}
    if residual == "another":
        tensors["residual"] = torch.randn(*lead, O).to(dtype)
    else:
        options["residual"] = "x" if residual == "x" else None
    return Problem(tensors, options, dtype)


def lora_problem(
    a_shape: TTShape, b_shape: TTShape, lead: Sequence[int], dtype: torch.dtype, *, residual: str = "another", **options
) -> Problem:
    """Arguments of `tt_lora`, as those of `adapter_problem`."""
    whole = adapter_problem(a_shape, b_shape, lead, dtype, residual=residual, biases=False, **options)
    names = {"down": "a", "up": "b", "down_shape": "a_shape", "up_shape": "b_shape"}
    tensors = {names.get(name, name): t for name, t in whole.tensors.items() if not name.endswith("bias")}
    return Problem(tensors, {names.get(name, name): option for name, option in whole.options.items()}, dtype)


def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """What the path that serves `like` multiplies it by: PyTorch's dropout of ones, or the mask of Triton and C."""
    from loretta_kernels._torch.rows import Dropout, compute_dtype, row_blocks
    from tests.triton.philox import kernel_mask

    N, I = like.numel() // like.shape[-1], like.shape[-1]
    if choose(like) == "c":
        return kernel_mask(N, I, p, seed).to(compute_dtype(like)).reshape(like.shape)
    blocks = row_blocks(torch.ones(N, I, dtype=like.dtype), compute_dtype(like), Dropout(p, torch.tensor(seed)))
    return torch.cat([block for block, _ in blocks]).reshape(like.shape)
