"""Registration of an operator with torch: a schema, an implementation by dispatch, a fake; and optional results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loretta_kernels._dispatch import run

_library = torch.library.Library("loretta", "DEF")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `loretta::NAME` of the schema `NAME(x, ..., str backend) -> ...` and return it."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, partial(run, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"loretta::{name}", fake, lib=_library)
    return getattr(torch.ops.loretta, name).default


def like_needed(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a fake backward returns: a gradient for each tensor that needs one, an empty tensor for the others."""
    x = tensors[0]
    assert x is not None
    return tuple(
        t.new_empty(t.shape) if t is not None and need else x.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def keep_needed(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What a backward hands to autograd: None in place of the empty tensors."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
