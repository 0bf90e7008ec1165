"""The one rule by which the answers of the operators are judged.

An answer is an output or a gradient. For an exact problem every answer must equal the definition's, computed in fp64
and rounded once to the answer's dtype.

For any other problem the relative error of an answer, in the norm of all its elements, may be five standard deviations
of the error that the backend's roundings cause: the computation is run in fp64 with random errors where the backend
rounds. `MODELS` lists what a backend rounds; a sum of n terms in fp32 is taken to err as sequential summation does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

import loretta_kernels
from loretta_kernels import reference
from loretta_kernels.reference import ACTIVATIONS, tt_sides
from loretta_kernels.selfcheck.problem import Answers, Problem
from loretta_kernels.shape import TTShape

DRAWS = 16
DEVIATIONS = 5  # one false alarm in a million
WHOLE = 2**22  # sums below this are exact in fp32, and in three products of tf32

# What each backend rounds to 16 bits where x has 16 bits; everything else is fp32 (fp64 for fp64).
MODELS: dict[str, frozenset[str]] = {
    "torch": frozenset(),
    "triton": frozenset(("x", "L_down", "R_up", "z", "ds")),
}
# What Triton multiplies in tf32 where x has 16 bits.
IN_TF32 = frozenset(("s", "R_down", "a", "L_up", "dz", "dh", "grad"))
TF32 = 2.0**-11

Rounding = Callable[[str, Tensor, int], Tensor]


@dataclass(frozen=True)
class Row:
    """One output or gradient: its error, and what is allowed."""

    case: str
    operator: str
    N: int
    dtype: str
    answer: str
    error: float
    bar: float

    @property
    def missed(self) -> bool:
        """Whether the error is above the bar; not a number counts as above."""
        return not self.error <= self.bar

    @property
    def text(self) -> str:
        """On one line."""
        return f"{self.case}, {self.dtype}: {self.answer} is off by {self.error:.1e}, {self.bar:.1e} is allowed"


def judged(
    problem: Problem, name: str = "", backend: str = "torch", functions: Any = loretta_kernels, runs: int = 1
) -> list[Row]:
    """A row for every answer to a problem, of each of so many runs."""
    truth = problem.to(torch.float64).solve(reference)
    ours = [problem.solve(functions) for _ in range(runs)]
    if missing := truth.keys() ^ ours[0].keys():
        raise RuntimeError(f"the answers differ in {sorted(missing)}")
    dtypes = {key: answer.dtype for key, answer in ours[0].items()}
    if is_exact(problem):
        bars = dict.fromkeys(truth, 0.0)
        truth = {key: answer.to(dtypes[key]).double() for key, answer in truth.items()}
    else:
        bars = allowed(problem, truth, dtypes, backend)
    N, dtype = prod(problem.x.shape[:-1]), str(problem.x.dtype).removeprefix("torch.")
    return [
        Row(name, problem.operator, N, dtype, key, error(answer, truth[key]), bars[key])
        for answers in ours
        for key, answer in answers.items()
    ]


def check(problem: Problem, backend: str = "torch", functions: Any = loretta_kernels, runs: int = 1) -> None:
    """Raise AssertionError with every answer whose error is above what is allowed."""
    missed = [row.text for row in judged(problem, problem.operator, backend, functions, runs) if row.missed]
    assert not missed, "\n".join(missed)


def error(answer: Tensor, truth: Tensor) -> float:
    """The relative error of all elements together, in fp64."""
    if answer.shape != truth.shape:
        raise RuntimeError(f"an answer has the shape {list(answer.shape)} in place of {list(truth.shape)}")
    difference, size = (answer.double() - truth.double()).norm().item(), truth.double().norm().item()
    return difference / size if size else difference


def allowed(problem: Problem, truth: Answers, dtypes: dict[str, torch.dtype], backend: str) -> dict[str, float]:
    """The error that each answer may have."""
    exact, generator = problem.to(torch.float64), torch.Generator(problem.x.device).manual_seed(0)
    rounding = _noise(problem, backend, generator)
    squares = dict.fromkeys(truth, 0.0)
    for _ in range(DRAWS):
        answers = staged(exact, rounding)
        for key in truth:
            rounded = _perturbed(answers[key], torch.finfo(dtypes[key]).eps / 2, generator)
            squares[key] += error(rounded, truth[key]) ** 2 / DRAWS
    return {key: DEVIATIONS * sqrt(square) for key, square in squares.items()}


def _noise(problem: Problem, backend: str, generator: torch.Generator) -> Rounding:
    """A function that perturbs operands where the backend rounds."""
    dtype = problem.x.dtype
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    is_16_bit = dtype in (torch.bfloat16, torch.float16)

    def rounding(stage: str, value: Tensor, terms: int) -> Tensor:
        value = _perturbed(value, sums * (0.5 + sqrt(terms) / 5), generator)
        if is_16_bit and stage in MODELS[backend]:
            value = _perturbed(value, torch.finfo(dtype).eps / 2, generator)
        if is_16_bit and backend == "triton" and stage in IN_TF32:
            value = _perturbed(value, TF32, generator)
        return value

    return rounding


def _perturbed(value: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Every element with a random relative error of at most `most`."""
    noise = torch.rand(value.shape, generator=generator, dtype=value.dtype, device=value.device)
    return value * (1 + most * (2 * noise - 1))


def is_exact(problem: Problem) -> bool:
    """Whether all values of a problem stay so small and so near to integers that no backend rounds before the end."""
    if problem.activation not in ("relu", "identity") or problem.x.dtype is torch.float64:
        return False
    fine = True

    def seen(stage: str, value: Tensor, terms: int) -> Tensor:
        nonlocal fine
        fine = fine and bool((value.abs() < WHOLE).all()) and bool((value * 16 == (value * 16).round()).all())
        if stage in MODELS["triton"]:
            fine = fine and torch.equal(value.to(problem.x.dtype).double(), value)
        if stage in IN_TF32 - {"grad"}:
            fine = fine and bool((value.abs() * 4 < 2048).all())
        return value

    answers = staged(problem.to(torch.float64), seen)
    fine = fine and all(bool((answer.abs() < WHOLE).all()) for answer in answers.values())
    return fine and all(answers[name].any() for name in ("ddown", "dscale") if name in answers)


def staged(problem: Problem, rounding: Rounding, mask: Tensor | None = None) -> Answers:
    """Every answer by the formulas of the operator's gradient, each operand of a product passed through `rounding`.

    `rounding` gets a name, the operand, and how many terms the sums have that it goes into. `mask` is what dropout
    multiplies x by, where it is not the problem's own.
    """
    if problem.index is not None:
        return _by_adapter(problem, problem.index, rounding)
    x, dy = problem.x.reshape(-1, problem.x.shape[-1]), problem.dy.reshape(-1, problem.dy.shape[-1])
    if mask is None and problem.dropout_p:
        mask = problem.mask().reshape(x.shape)
    N, scale = len(x), problem.scale
    down, up = problem.down, problem.up
    L_down, R_down = _sides("down", down.cores, down.shape, rounding)
    dropped = rounding("x", x if mask is None else x * mask, x.shape[1])
    s = rounding("s", dropped @ L_down, L_down.shape[1])
    answers: Answers = {}
    if up is None:
        z, R_up, bias = rounding("z", s * scale, s.shape[1]), R_down, down.bias
    else:
        h = s @ R_down + (0 if down.bias is None else down.bias)
        a = rounding("a", ACTIVATIONS[problem.activation](h), h.shape[1])
        L_up, R_up = _sides("up", up.cores, up.shape, rounding)
        unscaled = a @ L_up
        z, bias = rounding("z", unscaled * scale, unscaled.shape[1]), up.bias
    y = z @ R_up + (0 if bias is None else scale * bias)
    if problem.residual is not None:
        residual = x if isinstance(problem.residual, str) else problem.residual.reshape(y.shape)
        y = residual + y
        answers["dresidual"] = problem.dy
    answers["y"] = y.reshape(problem.dy.shape)

    dy = rounding("dy", dy, N)
    dz = rounding("dz", dy @ R_up.t(), R_up.shape[1])
    dR_up = rounding("grad", z.t() @ dy, N)
    dbias = scale * dy.sum(0)
    dscale = (dz * (s if up is None else unscaled)).sum() + (0 if bias is None else dy.sum(0) @ bias)
    if up is None:
        ds, dR_down = dz * scale, dR_up
        answers["ddown_bias"] = dbias
    else:
        dz_scaled = dz * scale
        da = rounding("da", dz_scaled @ L_up.t(), dz.shape[1])
        dL_up = rounding("grad", a.t() @ dz_scaled, N)
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (dh,) = torch.autograd.grad(ACTIVATIONS[problem.activation](leaf), leaf, da)
        answers["ddown_bias"] = rounding("sum", dh, N).sum(0)
        dh = rounding("dh", dh, dh.shape[1])
        dR_down = rounding("grad", s.t() @ dh, N)
        ds = dh @ R_down.t()
        answers |= {"dup": _cores("up", up.cores, up.shape, dL_up, dR_up, rounding), "dup_bias": dbias}
    ds = rounding("ds", ds, ds.shape[1])
    dx = ds @ L_down.t()
    dx = dx if mask is None else dx * mask
    answers["dx"] = (dx + dy if problem.residual == "x" else dx).reshape(problem.x.shape)
    dL_down = rounding("grad", dropped.t() @ ds, N)
    answers["ddown"] = _cores("down", down.cores, down.shape, dL_down, dR_down, rounding)
    if isinstance(scale, Tensor):
        answers["dscale"] = dscale.reshape(scale.shape)
    wanted = {"y", *(f"d{name}" for name in problem.tensors)}
    return {key: answer for key, answer in answers.items() if key in wanted}


def _by_adapter(problem: Problem, index: Tensor, rounding: Rounding) -> Answers:
    """The answers for stacked trains: each adapter's for its rows alone, and those of rows without one."""
    tensors, dy = problem.tensors, problem.dy
    of_rows = {"x": tensors["x"], "residual": tensors.get("residual"), "mask": None}
    if problem.dropout_p:
        of_rows["mask"] = problem.mask()
    none = index == -1
    base = problem.x if isinstance(problem.residual, str) else problem.residual
    answers: Answers = {f"d{name}": torch.zeros_like(t) for name, t in tensors.items()}
    answers["y"] = torch.zeros_like(dy)
    if base is not None:
        answers["y"][none] = base[none]
    if problem.residual is not None:
        answers["dx" if isinstance(problem.residual, str) else "dresidual"][none] = dy[none]
    for a in index.unique().tolist():
        mine = index == a
        if a == -1:
            continue
        own = {name: t[mine] if name in of_rows else t[a] for name, t in tensors.items()}
        one = replace(problem.with_tensors(own), dy=dy[mine], index=None)
        mask = None if of_rows["mask"] is None else of_rows["mask"][mine].reshape(-1, problem.x.shape[-1])
        for name, answer in staged(one, rounding, mask).items():
            answers[name][mine if name == "y" or name.removeprefix("d") in of_rows else a] = answer
    return answers


def _sides(name: str, cores: Tensor, shape: TTShape, rounding: Rounding) -> Iterator[Tensor]:
    """L and R, perturbed, of perturbed cores."""
    L, R = tt_sides(rounding("cores", cores, max(shape.ranks, default=1)), shape)
    yield rounding(f"L_{name}", L, shape.in_features)
    yield rounding(f"R_{name}", R, shape.waist)


def _cores(name: str, cores: Tensor, shape: TTShape, dL: Tensor, dR: Tensor, rounding: Rounding) -> Tensor:
    """The gradient of the cores from those of the sides."""
    with torch.enable_grad():
        leaf = rounding("cores", cores, max(shape.in_features, shape.out_features)).detach().requires_grad_()
        (dcores,) = torch.autograd.grad(tt_sides(leaf, shape), leaf, (dL, dR))
    return dcores
