"""One problem for the operators: random numbers, or whole numbers for which every backend must be exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

import loretta_kernels
from loretta_kernels import reference
from loretta_kernels.philox import dropout_factor
from loretta_kernels.shape import TTShape
from loretta_kernels.train import TT

Answers = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A call with numbers: y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up), and dy.

    Attributes:
        operator: "tt_linear" (of `down` alone), "tt_adapter" or "tt_lora".
        residual: "x", a tensor, or None.
        scale: a number, or a tensor that is learnt.
        index: of stacked trains, that which a row uses, over the first of x's leading dimensions.
    """

    operator: str
    x: Tensor
    down: TT
    up: TT | None
    dy: Tensor
    residual: Tensor | str | None = None
    scale: Tensor | float = 1.0
    activation: str = "identity"
    dropout_p: float = 0.0
    seed: int = 11
    index: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is differentiated, by name."""
        up = self.up or TT(torch.empty(0), self.down.shape)
        named = {
            "x": self.x,
            "down": self.down.cores,
            "down_bias": self.down.bias,
            "up": self.up and up.cores,
            "up_bias": up.bias,
            "scale": self.scale,
            "residual": self.residual,
        }
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Problem:
        """The problem with other tensors in the place of its own."""
        known = self.tensors | tensors
        up = self.up and TT(known["up"], self.up.shape, known.get("up_bias"))
        return replace(
            self,
            x=known["x"],
            down=TT(known["down"], self.down.shape, known.get("down_bias")),
            up=up,
            scale=known.get("scale", self.scale),
            residual=known.get("residual", self.residual),
        )

    def to(self, where: torch.dtype | torch.device | str) -> Problem:
        """The same values in another dtype or on another device."""
        moved = self.with_tensors({name: t.to(where) for name, t in self.tensors.items()})
        index = self.index if self.index is None or isinstance(where, torch.dtype) else self.index.to(where)
        return replace(moved, dy=self.dy.to(where), index=index)

    def run(self, functions: Any = loretta_kernels, **changes: Any) -> Tensor:
        """y by the functions of a module: those of this package, or the definitions of `reference`."""
        if self.index is not None:
            changes = {"index": self.index} | changes
        if self.operator == "tt_linear":
            return functions.tt_linear(self.x, self.down, **changes)
        options: dict[str, Any] = {"scale": self.scale, "residual": self.x if self.residual == "x" else self.residual}
        if self.operator == "tt_adapter":
            options["activation"] = self.activation
        if self.dropout_p and functions is reference:
            options["mask"] = self.mask()
        elif self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "seed": self.seed}
        return getattr(functions, self.operator)(self.x, self.down, self.up, **options | changes)

    def mask(self) -> Tensor:
        """What dropout multiplies x by."""
        N, seed = prod(self.x.shape[:-1]), torch.tensor(self.seed, device=self.x.device)
        return dropout_factor(seed, 0, N, self.x.shape[-1], self.dropout_p, torch.float64).view(self.x.shape)

    def solve(self, functions: Any = loretta_kernels) -> Answers:
        """y, and the gradient of every tensor as "d" + its name."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in self.tensors.items()}
        y = self.with_tensors(leaves).run(functions)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def random_problem(
    operator: str,
    shapes: Sequence[TTShape],
    rows: int | Sequence[int],
    dtype: torch.dtype,
    *,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Normal numbers; rows in `dtype`, parameters in fp32 (fp64 for fp64).

    Args:
        options: `residual` ("x", "another", "none"), `biases`, `scale`, `activation`, `dropout_p`, `param_dtype`;
            `adapters`, how many trains are stacked, and `index`, which of them each row uses. By default as the layers
            call the operators: tt_adapter with x for its residual and biases, tt_lora with another residual and none,
            tt_linear with a bias; a learnt scale; relu.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def cores(shape: TTShape) -> Tensor:
        """Cores whose matrix maps unit-sized features to unit-sized features."""
        paths = prod(shape.ranks) * shape.in_features * prod(shape.factors) ** 2
        return normal(shape.num_params) * paths ** (-0.5 / len(shape.modes))

    return _problem(operator, shapes, rows, dtype, normal, cores, 0.7, **options)


def exact_problem(
    operator: str,
    shapes: Sequence[TTShape],
    rows: int | Sequence[int],
    dtype: torch.dtype,
    *,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Few and small whole numbers, such that every product and sum of the computation is exact in 16 bits.

    Whatever the order of its sums, a right backend gives each answer without any error but the last rounding to the
    answer's dtype. A row of a core has one number, 1 or -1, for each mode; so has L, and R has no others. The
    options are those of `random_problem`; the activation must be relu or identity, dropout_p a half or none.
    """
    generator = torch.Generator().manual_seed(seed)
    density = 4.0  # numbers other than 0 in a row of x and of dy

    def whole(*size: int) -> Tensor:
        chosen = torch.rand(*size, generator=generator) < density / size[-1]
        return torch.where(chosen, torch.randint(1, 3, size, generator=generator) * _signs(size, generator), 0).double()

    def cores(shape: TTShape) -> Tensor:
        parts = []
        for r, n, r_next in shape.core_shapes:
            column = torch.randint(r_next, (r, n, 1), generator=generator)
            parts.append(
                torch.zeros(r, n, r_next).scatter_(2, column, _signs((r, n, 1), generator).float()).reshape(-1)
            )
        return torch.cat(parts).double()

    from loretta_kernels.selfcheck.judge import is_exact

    for _ in range(20):
        problem = _problem(operator, shapes, rows, dtype, whole, cores, 0.5, **options)
        if is_exact(problem):
            return problem
        density /= 1.5
    raise RuntimeError(f"found no problem of {shapes} whose numbers stay small enough for {dtype}")


def _signs(size: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(size), generator=generator) * 2 - 1


def _problem(
    operator: str,
    shapes: Sequence[TTShape],
    rows: int | Sequence[int],
    dtype: torch.dtype,
    draw: Callable[..., Tensor],
    cores: Callable[[TTShape], Tensor],
    learnt_scale: float,
    *,
    residual: str | None = None,
    biases: bool | None = None,
    scale: Tensor | float | None = None,
    activation: str = "relu",
    dropout_p: float = 0.0,
    param_dtype: torch.dtype | None = None,
    adapters: int | None = None,
    index: Tensor | None = None,
) -> Problem:
    stack = () if adapters is None else (adapters,)
    lead = (rows,) if isinstance(rows, int) else tuple(rows)
    wide = param_dtype or torch.promote_types(dtype, torch.float32)
    first, last = shapes[0], shapes[-1]
    adapts = operator == "tt_adapter"
    residual = residual or ("x" if adapts else "another" if operator == "tt_lora" else "none")
    biases = operator != "tt_lora" if biases is None else biases
    x = draw(*lead, first.in_features).to(dtype)

    def stacked(one: Callable[[], Tensor]) -> Tensor:
        return (one() if adapters is None else torch.stack([one() for _ in range(adapters)])).to(wide)

    trains = [
        TT(stacked(partial(cores, shape)), shape, draw(*stack, shape.out_features).to(wide) if biases else None)
        for shape in shapes
    ]
    other: Tensor | str | None = draw(*lead, last.out_features).to(dtype) if residual == "another" else residual
    if scale is None:
        scale = 1.0 if operator == "tt_linear" else torch.tensor(learnt_scale, dtype=wide)
        if adapters is not None and operator != "tt_linear":
            scale = learnt_scale * (1 + torch.arange(adapters) % 2).to(wide)
    return Problem(
        operator,
        x,
        trains[0],
        None if operator == "tt_linear" else trains[1],
        draw(*lead, last.out_features).to(dtype),
        None if other == "none" else other,
        scale,
        activation if adapts else "identity",
        dropout_p,
        index=index,
    )
