"""One operator at one size: inputs that every peer shares, and the answers in fp64 that every peer must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.trains import flat, wave_cores
from loretta_kernels import TT, TTShape, reference

SCALE = 2.0  # LoRA's alpha / r
KINK = 1e-4


@dataclass(frozen=True)
class Cell:
    """An operator and its size.

    Args:
        kind: "adp" (tt_adapter with relu, biases and x for a residual), "rep" (tt_lora beside a given base output) or
            "cls" (tt_linear, d x d, with a bias).
        d: hidden size.
        width: bottleneck of adp, r of rep; not of cls.
        rank: of every bond.
        N: rows.
        compiled: whether torch.compile takes part.
    """

    kind: str
    d: int
    width: int
    rank: int
    N: int
    compiled: bool = False

    @property
    def name(self) -> str:
        """On one line."""
        return f"{self.kind} d={self.d} width={self.width} rank={self.rank} N={self.N}"


class Problem:
    """A cell's inputs on a device: x, dy, biases and base output in `dtype`, trains that fit any shape."""

    def __init__(self, cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
        self.cell, self.dtype, self.device = cell, dtype, device
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        N, d = cell.N, cell.d
        self.shapes = _shapes(cell)
        self.x, self.dy = normal(N, d), normal(N, d)
        self.base = normal(N, d) if cell.kind == "rep" else None
        widths = {"adp": (cell.width, d), "rep": (), "cls": (d,)}[cell.kind]
        self.biases = [normal(width) for width in widths]
        if cell.kind == "adp":
            self._avoid_kink()
        self.x.requires_grad_()

    def make(self, position: int) -> Callable[[list[int]], list[Tensor]]:
        """For the first or second matrix: its cores in fp64, for any modes; unit-sized features to such features."""
        features, rank = self.shapes[position].in_features, self.cell.rank
        scale = (features * ((rank + 1) // 2)) ** -0.5
        return lambda modes: wave_cores(modes, rank, scale, seed=position)

    def cores(self, position: int) -> Tensor:
        """The first or second train as our operators take it: a leaf in fp32."""
        return flat(self.make(position)(list(self.shapes[position].modes))).to(self.device).requires_grad_()

    def matrix(self, position: int) -> Tensor:
        """The same as a matrix in fp64."""
        shape = self.shapes[position]
        cores = torch.cat([core.reshape(-1) for core in self.make(position)(list(shape.modes))])
        return reference.tt_matrix(TT(cores, shape)).to(self.device)

    def define(self, x: Tensor, biases: list[Tensor]) -> Tensor:
        """The operator by its definition, in x's dtype."""
        first, *others = (self.matrix(k).to(x.dtype) for k in range(len(self.shapes)))
        if self.cell.kind == "cls":
            return x @ first + biases[0]
        if self.cell.kind == "rep":
            assert self.base is not None
            return self.base.to(x.dtype) + SCALE * (x @ first @ others[0])
        return x + torch.relu(x @ first + biases[0]) @ others[0] + biases[1]

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """y and the gradients of x and of the biases in fp64."""
        x = self.x.detach().double().requires_grad_()
        biases = [bias.double().requires_grad_() for bias in self.biases]
        y = self.define(x, biases)
        grads = torch.autograd.grad(y, [x, *biases], self.dy.double())
        return {"y": y.detach()} | dict(zip(["x", *(f"bias{k}" for k in range(len(biases)))], grads, strict=True))

    def _avoid_kink(self) -> None:
        """Zero the rows that lead relu so near to 0 that a rounding could decide its derivative."""
        h = self.x.double() @ self.matrix(0) + self.biases[0].double()
        self.x[(h.abs() < KINK).any(dim=1)] = 0


def _shapes(cell: Cell) -> tuple[TTShape, ...]:
    """The trains as our layers make them by default."""
    if cell.kind == "cls":
        return (TTShape.for_matrix(cell.d, cell.d, cell.rank),)
    return TTShape.for_matrix(cell.d, cell.width, cell.rank), TTShape.for_matrix(cell.width, cell.d, cell.rank)
