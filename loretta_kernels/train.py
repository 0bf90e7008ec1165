"""A tensor train with its values, the argument of every function of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from loretta_kernels.shape import TTShape


@dataclass(frozen=True, eq=False)
class TT:
    """A tensor train: the matrix `W [shape.in_features, shape.out_features]`, and a bias that is added to `x · W`.

    It is a pytree, so that `torch.func`, `torch.export` and `torch.utils.checkpoint` see its tensors.

    Args:
        cores: `[shape.num_params]`, core after core, each row-major `[r, n, r']`; fp32, or the dtype of the rows.
        shape: modes, ranks and gains.
        bias: `[shape.out_features]`, or None.

    Example:
        >>> shape = TTShape.for_matrix(768, 64, rank=5)
        >>> train = TT(0.3 * torch.randn(shape.num_params), shape, bias=torch.zeros(64))
    """

    cores: Tensor
    shape: TTShape
    bias: Tensor | None = None


def _flatten(train: TT) -> tuple[list[Any], TTShape]:
    return [train.cores, train.bias], train.shape


def _flatten_with_keys(train: TT) -> tuple[list[tuple[pytree.KeyEntry, Any]], TTShape]:
    return [(pytree.GetAttrKey("cores"), train.cores), (pytree.GetAttrKey("bias"), train.bias)], train.shape


def _unflatten(tensors: Any, shape: TTShape) -> TT:
    cores, bias = tensors
    return TT(cores, shape, bias)


pytree.register_pytree_node(
    TT,
    _flatten,
    _unflatten,
    serialized_type_name="loretta_kernels.TT",
    to_dumpable_context=lambda shape: list(shape.spec),
    from_dumpable_context=lambda spec: TTShape.from_spec(tuple(spec)),
    flatten_with_keys_fn=_flatten_with_keys,
)
