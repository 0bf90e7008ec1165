"""Layers for any PyTorch model: a tensor-train linear, a bottleneck adapter, and a low-rank update beside a linear."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from loretta_kernels.functions import tt_adapter, tt_linear, tt_lora, tt_matrix
from loretta_kernels.shape import TTShape
from loretta_kernels.svd import flat, tt_svd
from loretta_kernels.train import TT


class TTLinear(nn.Module):
    """`y = x · W + bias`, where W [in_features, out_features] is a tensor train: a linear layer of few parameters.

    Args:
        in_features, out_features: any sizes.
        rank: of every bond.
        bias: add a bias [out_features].
        shape: modes and ranks of W, instead of `in_features`, `out_features` and `rank`.
        device, dtype: of the parameters.

    Attributes:
        cores: flat parameter [shape.num_params]: core after core, each row-major [r, n, r'].
        bias: parameter [out_features], or None.
        shape: modes and ranks.
        error: of a layer made by `from_linear`: |W - weight| / |weight| in the Frobenius norm; otherwise None.

    Raises:
        TypeError, ValueError: sizes or ranks that are no positive integers.

    Example:
        >>> layer = TTLinear(768, 768, rank=5)
        >>> layer(torch.randn(4, 768)).shape
        torch.Size([4, 768])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        rank: int = 5,
        bias: bool = True,
        *,
        shape: TTShape | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shape is None:
            if in_features is None or out_features is None:
                raise TypeError("give in_features and out_features, or a shape")
            shape = TTShape.for_matrix(in_features, out_features, rank)
        self.shape, self.error = shape, None
        self.cores = nn.Parameter(torch.empty(shape.num_params, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape.out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    @property
    def tt(self) -> TT:
        """The train as the functions take it."""
        return TT(self.cores, self.shape, self.bias)

    @torch.no_grad()
    def reset_parameters(self, zero: bool = False, random_bias: bool = False) -> None:
        """Draw every core from one normal distribution, such that W's entries have variance 1 / in_features.

        An entry of W is a sum over all bonds of products of one entry per core, so with d cores of variance v its
        variance is `v ** d * prod(bond ranks)`.

        Args:
            zero: set the last core to zero, so that W = 0 while every other core keeps its scale.
            random_bias: draw the bias too, instead of setting it to zero.
        """
        gain = math.prod(self.shape.factors)
        paths = math.prod(self.shape.bond_ranks) * gain**2
        variance = (1 / (self.in_features * paths)) ** (1 / len(self.shape.modes))
        nn.init.normal_(self.cores, std=math.sqrt(variance))
        if zero:
            self.cores[-self.shape.core_sizes[-1] :] = 0
        if self.bias is not None:
            if random_bias:
                nn.init.normal_(self.bias, std=0.02)
            else:
                nn.init.zeros_(self.bias)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int) -> TTLinear:
        """A trained linear layer, compressed by TT-SVD; its bias is copied, and `error` is the relative error of W.

        Args:
            linear: the layer.
            rank: no bond has more.

        Raises:
            TypeError: not an `nn.Linear`.

        Example:
            >>> small = TTLinear.from_linear(nn.Linear(768, 96), rank=32)
            >>> 0 < small.error < 1
            True
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
        modes = TTShape.for_matrix(linear.in_features, linear.out_features, rank)
        weight = linear.weight.T.double()
        cores = tt_svd(weight, modes.in_modes, modes.out_modes, rank)
        shape = TTShape(modes.in_modes, modes.out_modes, [core.shape[2] for core in cores[:-1]])
        layer = cls(shape=shape, bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)
        layer.cores.copy_(flat(cores, linear.weight.dtype))
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        norm = weight.norm().item()
        difference = (tt_matrix(TT(layer.cores.double(), shape)) - weight).norm().item()
        layer.error = difference / norm if norm else difference
        return layer

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer that this train stands for, in `dtype` (by default that of the cores)."""
        dtype = dtype or self.cores.dtype
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(tt_matrix(self.tt).T.to(dtype).contiguous())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype).clone())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        return tt_linear(x, self.tt)

    def extra_repr(self) -> str:
        i, o = self.shape.in_modes, self.shape.out_modes
        return f"{list(i)} x {list(o)}, ranks={list(self.shape.bond_ranks)}, bias={self.bias is not None}"


class TTAdapter(nn.Module):
    """`y = x + scale · (act(drop(x) · W_down + b_down) · W_up + b_up)`: a bottleneck adapter that starts as y = x.

    Args:
        features: of x and y.
        bottleneck: width between the two trains.
        rank: of every bond.
        activation: relu, gelu, gelu_tanh, silu, tanh or identity.
        scale: a number.
        dropout: the probability that an element of x is dropped in training, in [0, 1).
        bias: whether the trains have biases.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: sizes or ranks that are no positive integers; at the first call, other wrong values.

    Example:
        >>> adapter = TTAdapter(768, bottleneck=64, activation="gelu")
        >>> hidden = torch.randn(2, 5, 768)
        >>> torch.equal(adapter(hidden), hidden)
        True
    """

    def __init__(
        self,
        features: int,
        bottleneck: int = 64,
        rank: int = 5,
        activation: str = "relu",
        scale: float = 1.0,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = TTLinear(features, bottleneck, rank, bias, device=device, dtype=dtype)
        self.up = TTLinear(bottleneck, features, rank, bias, device=device, dtype=dtype)
        self.up.reset_parameters(zero=True)
        self.activation, self.scale, self.dropout = activation, scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., features] to [..., features]."""
        p = self.dropout if self.training else 0.0
        return tt_adapter(
            x, self.down.tt, self.up.tt, activation=self.activation, scale=self.scale, residual=x, dropout_p=p
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, scale={self.scale}, dropout={self.dropout}"


class TTLoRA(nn.Module):
    """`y = linear(x) + alpha / r · drop(x) · A · B`, A and B tensor trains: a frozen linear with a trained update.

    Args:
        linear: any module that maps [..., in_features] to [..., out_features]; its parameters are frozen.
        r: inner dimension of A and B.
        rank: of every bond.
        alpha: the update is scaled by alpha / r.
        dropout: the probability that an element of x is dropped on its way to A in training, in [0, 1).
        in_features, out_features: where the linear has no attributes of these names.
        device, dtype: of the cores; by default those of new tensors.

    Raises:
        TypeError, ValueError: sizes or ranks that are no positive integers; at the first call, other wrong values.

    Example:
        >>> model = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 10))
        >>> model[0] = TTLoRA(model[0], r=8, rank=3)
        >>> model(torch.randn(4, 96)).sum().backward()
    """

    def __init__(
        self,
        linear: nn.Module,
        r: int = 8,
        rank: int = 5,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        I = in_features or getattr(linear, "in_features", None)
        O = out_features or getattr(linear, "out_features", None)
        self.a = TTLinear(I, r, rank, bias=False, device=device, dtype=dtype)
        self.b = TTLinear(r, O, rank, bias=False, device=device, dtype=dtype)
        self.b.reset_parameters(zero=True)
        self.scale, self.dropout = alpha / r, dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        p = self.dropout if self.training else 0.0
        return tt_lora(x, self.a.tt, self.b.tt, scale=self.scale, residual=self.linear(x), dropout_p=p)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}"
