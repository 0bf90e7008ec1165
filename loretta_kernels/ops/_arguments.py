"""What the public functions check in their arguments and make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from loretta_kernels.shape import TTShape


def check_x(x: Tensor, shape: TTShape) -> None:
    """Raise unless `x [..., in_features]` suits the shape."""
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating-point dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != shape.in_features:
        raise ValueError(f"x must be [..., {shape.in_features}] for {shape}, got {list(x.shape)}")


def check_cores(name: str, cores: Tensor, shape: TTShape) -> None:
    """Raise unless `cores` is the flat tensor of the shape's cores."""
    if not isinstance(shape, TTShape):
        raise TypeError(f"the shape of {name} must be a TTShape, got {type(shape).__name__}")
    check_vector(name, cores, shape.num_params)


def check_vector(name: str, vector: Tensor | None, size: int) -> None:
    """Raise unless `vector` is None or a floating-point `[size]`."""
    if vector is None:
        return
    if not vector.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {vector.dtype}")
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{name} must be [{size}], got {list(vector.shape)}")


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a one-element int64 tensor; None draws one from the RNG of the device that reads it.

    So nobody waits for a GPU, and a CUDA graph draws another one at every replay.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        return torch.tensor(seed, dtype=torch.int64)
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be an int or a one-element int64 tensor, got {seed.dtype} {list(seed.shape)}")
    return seed
