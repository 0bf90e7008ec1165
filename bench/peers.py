"""Who is measured: each peer is the same function with the same inputs, at its own best layout.

All are bare operators: no layer's Python around them, no dropout. Peers hold their weights in x's dtype, which is the
faster choice for them; our cores are in fp32, as our layers keep them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bench import upstream
from bench.problems import SCALE, Problem
from bench.timing import Work
from bench.upstream import Unavailable
from loretta_kernels import TT, backend, reference, tt_adapter, tt_linear, tt_lora

OURS = "loretta"
LYCORIS = Path(__file__).parents[1] / ".cache" / "peers" / "lycoris"
BARS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of norms; another function is off by about 1


@dataclass(frozen=True)
class Peer:
    """A function of shared inputs.

    Args:
        forward: computes y.
        leaves: what needs a gradient, by name: x, bias0, bias1, and parameters that only this peer has.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]

    def gradients(self, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """Those of all leaves."""
        return torch.autograd.grad(y, list(self.leaves.values()), dy)

    def work(self, dy: Tensor) -> Work:
        """Forward and backward as they are timed."""
        return Work(self.forward, lambda y: self.gradients(y, dy))

    def error(self, problem: Problem) -> float:
        """The largest error of y and of all gradients that the definition has, relative and in norm."""
        y = self.forward()
        found = {"y": y.detach()} | dict(zip(self.leaves, self.gradients(y, problem.dy), strict=True))
        errors = [(found[name].double() - true).norm() / true.norm() for name, true in problem.truth.items()]
        return torch.stack(errors).max().item()


def peers_of(problem: Problem) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Each peer's name, and what makes it (or raises Unavailable)."""
    cell, best = problem.cell, "triton" if problem.device.type == "cuda" else "torch"
    yield OURS, lambda: _loretta(problem, best)
    if best != "torch":
        yield "loretta torch", lambda: _loretta(problem, "torch")
    if cell.compiled:
        yield "loretta compiled", lambda: _loretta(problem, best, compiled=True)
        yield "plain compiled", lambda: _plain(problem)
    yield "upstream", lambda: _upstream(problem)
    if cell.kind == "rep":
        yield "LoRA r=8", lambda: _lora(problem, 8)
        yield "LoRA r=16", lambda: _lora(problem, 16)
        if problem.device.type == "cuda":  # elsewhere it is plain PyTorch, as PEFT's
            yield "LyCORIS r=8", lambda: _lycoris(problem)
    else:
        yield "dense", lambda: _dense(problem)


def copy_of_the_bytes(problem: Problem) -> Work:
    """A copy of what must move: forward x, the base output where there is one, and y; backward dy, x and dx."""
    row = problem.cell.N * problem.cell.d * problem.dtype.itemsize
    source = torch.empty(3 * row, dtype=torch.uint8, device=problem.device)
    target = torch.empty_like(source)

    def copy(size: int) -> None:
        target[: size // 2].copy_(source[: size // 2])  # read once and written once

    return Work(lambda: copy(row * (3 if problem.cell.kind == "rep" else 2)), lambda _: copy(3 * row))


def base_linear(problem: Problem) -> Work:
    """A frozen d x d linear on the same rows."""
    W = torch.randn(problem.cell.d, problem.cell.d, device=problem.device).to(problem.dtype)
    return Work(lambda: F.linear(problem.x.detach(), W), lambda _: problem.dy @ W)


def _with_biases(problem: Problem, parameters: dict[str, Tensor], biases: list[Tensor] | None = None) -> dict:
    """All leaves: x, the biases (fresh ones unless the peer has its own), the parameters."""
    biases = [bias.clone().requires_grad_() for bias in problem.biases] if biases is None else biases
    return {"x": problem.x} | {f"bias{k}": bias for k, bias in enumerate(biases)} | parameters


def _loretta(problem: Problem, name: str, compiled: bool = False) -> Peer:
    """Our operator."""
    leaves = _with_biases(problem, {f"cores{k}": problem.cores(k) for k in range(len(problem.shapes))})
    trains = [TT(leaves[f"cores{k}"], shape, leaves.get(f"bias{k}")) for k, shape in enumerate(problem.shapes)]

    def operator() -> Tensor:
        if problem.cell.kind == "cls":
            return tt_linear(leaves["x"], *trains)
        if problem.cell.kind == "rep":
            return tt_lora(leaves["x"], *trains, scale=SCALE, residual=problem.base)
        return tt_adapter(leaves["x"], *trains, residual=leaves["x"])

    run = _compiled(operator) if compiled else operator

    def call() -> Tensor:
        with backend(name):
            return run()

    return Peer(call, leaves)


def _compiled(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The function under torch.compile, compiled."""
    torch._dynamo.config.recompile_limit = 64  # one for each size
    compiled = torch.compile(function, fullgraph=True)
    try:
        compiled()
    except Exception as error:
        raise Unavailable(f"torch.compile: {type(error).__name__}: {error}"[:200]) from error
    return compiled


def _plain(problem: Problem) -> Peer:
    """The same algebra in plain PyTorch, autograd's backward, under torch.compile."""
    leaves = _with_biases(problem, {f"cores{k}": problem.cores(k) for k in range(len(problem.shapes))})
    shapes, kind, base, dtype = problem.shapes, problem.cell.kind, problem.base, problem.dtype

    def project(x: Tensor, k: int) -> Tensor:
        L, R = reference.tt_sides(leaves[f"cores{k}"].to(dtype), shapes[k])
        return x @ L @ R

    def call() -> Tensor:
        h = project(leaves["x"], 0)
        if kind == "rep":
            return base + SCALE * project(h, 1)
        h = h + leaves["bias0"]
        return h if kind == "cls" else leaves["x"] + project(torch.relu(h), 1) + leaves["bias1"]

    return Peer(_compiled(call), leaves)


def _upstream(problem: Problem) -> Peer:
    """The released layers' projections, the rest around them in plain PyTorch."""
    cell = problem.cell
    modules = [m.to(problem.device) for m in upstream.projections(cell.kind, cell.d, cell.width, cell.rank)]
    parameters: dict[str, Tensor] = {}
    for k, module in enumerate(modules):
        upstream.set_cores(module, problem.make(k))
        if cell.kind != "rep":
            upstream.set_bias(module, problem.biases[k])
        module.to(problem.dtype)
        parameters |= {f"cores{k}.{j}": core for j, core in enumerate(upstream.cores(module))}
    biases = [upstream.bias(module) for module in modules] if cell.kind != "rep" else []
    return Peer(_two_step(problem, modules), _with_biases(problem, parameters, biases))


def _dense(problem: Problem) -> Peer:
    """The same matrices as nn.Linear."""
    modules = [_linear(problem.matrix(k), bias, problem.dtype) for k, bias in enumerate(problem.biases)]
    weights: dict[str, Tensor] = {f"weight{k}": module.weight for k, module in enumerate(modules)}
    return Peer(_two_step(problem, modules), _with_biases(problem, weights, [module.bias for module in modules]))


def _lora(problem: Problem, r: int) -> Peer:
    """PEFT's LoRA at rank r, ranks that the problem does not have filled up with zeros."""
    model = nn.ModuleDict({"proj": nn.Linear(problem.cell.d, problem.cell.d, bias=False, device="meta")})
    layer = get_peft_model(model, LoraConfig(r=r, target_modules=["proj"])).base_model.model["proj"]
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    A.weight, B.weight = _factors(problem, r)
    return Peer(_two_step(problem, [A, B]), _with_biases(problem, {"A": A.weight, "B": B.weight}))


def _factors(problem: Problem, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    """LoRA's A `[r, I]` and B `[O, r]`, with zeros in the ranks that the problem does not have."""
    missing = r - problem.cell.width
    if missing < 0:
        raise Unavailable(f"the problem has r = {problem.cell.width}")
    A, B = F.pad(problem.matrix(0), (0, missing)), F.pad(problem.matrix(1), (0, 0, 0, missing))
    return nn.Parameter(A.t().to(problem.dtype).contiguous()), nn.Parameter(B.t().to(problem.dtype).contiguous())


def _lycoris(problem: Problem) -> Peer:
    """LyCORIS's LoRA: fused Triton kernels, one launch forward and one backward."""
    delta, base = lycoris_delta(), problem.base
    A, B = _factors(problem, 8)
    leaves = _with_biases(problem, {"A": A, "B": B})
    return Peer(lambda: base + delta(problem.x, None, A, B, None, gamma=SCALE), leaves)


@cache
def lycoris_delta() -> Callable[..., Tensor]:
    """What computes scale · x · A · B there.

    Raises:
        Unavailable: it is not installed, or cannot be imported.
    """
    if not LYCORIS.is_dir():
        raise Unavailable("not installed: make peers")
    sys.path.append(str(LYCORIS))
    try:
        delta: Callable[..., Tensor] = import_module("lycoris.functional.locon").bypass_forward_diff
    except Exception as error:
        raise Unavailable(f"import: {type(error).__name__}: {error}") from error
    return delta


def _two_step(problem: Problem, modules: list[nn.Module]) -> Callable[[], Tensor]:
    """The operator made of a peer's own projections."""
    x, base, first = problem.x, problem.base, modules[0]
    if problem.cell.kind == "cls":
        return lambda: first(x)
    second = modules[1]
    if problem.cell.kind == "rep":
        return lambda: base + second(first(x)) * SCALE
    return lambda: x + second(torch.relu(first(x)))


def _linear(W: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    """x · W + bias."""
    linear = nn.Linear(*W.shape, device="meta")
    linear.weight = nn.Parameter(W.t().to(dtype).contiguous())
    linear.bias = nn.Parameter(bias.clone())
    return linear
