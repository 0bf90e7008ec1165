"""Registration of an operator with torch: a schema, an implementation by dispatch, a fake; and optional results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from loretta_kernels._dispatch import run

_library = torch.library.Library("loretta", "DEF")
_PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str, tuple, list))


def operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `loretta::NAME` of the schema `NAME(x, ..., str backend) -> ...` and return what calls it.

    Where nothing looks on, no compiler, mode or tensor of another class, and tensors have elements, the call does
    without torch's dispatcher, whose time shows where rows are few.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, partial(_run_registered, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"loretta::{name}", fake, lib=_library)
    registered = getattr(torch.ops.loretta, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or args[0].is_meta:
            return registered(*args)
        return run(name, *args) if _PLAIN.issuperset(map(type, args)) else registered(*args)

    return call


def _run_registered(name: str, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As `run`, with an empty tensor in place of None: a schema's results are tensors."""
    return tuple(x.new_empty(0) if result is None else result for result in run(name, x, *args))


def like_needed(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a fake backward returns: a gradient for each tensor that needs one, an empty tensor for the others."""
    x = tensors[0]
    assert x is not None
    return tuple(
        t.new_empty(t.shape) if t is not None and need else x.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def keep_needed(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What a backward hands to autograd: None in place of empty tensors."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
