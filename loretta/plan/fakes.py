"""A model whose tensors have sizes but no memory, and the surroundings in which it runs a real training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_tensors(model: nn.Module, as_on_gpu: bool) -> Iterator[None]:
    """Put a fake tensor in the place of every parameter and buffer of a model on the meta device, and run inside.

    Building the model inside the mode would fail: PEFT moves adapters by `.to()`. The fakes are CPU tensors, since
    attention chooses its kernel by device and this torch may know no other.

    Args:
        as_on_gpu: count dropout as CUDA does it: a mask of one byte an element, none for attention.
    """
    mode = FakeTensorMode()
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied weights stay tied
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
    with ExitStack() as stack:
        for change in [_no_packed_sequences(), *(_dropout_of_cuda() if as_on_gpu else [])]:
            stack.enter_context(change)
        stack.enter_context(mode)
        yield


def _no_packed_sequences() -> Any:
    """Without values transformers cannot see that no row is packed; it would make a mask for sdpa, 9 % more bytes."""
    return mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)


def _dropout_of_cuda() -> list[Any]:
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *args: Any,
        **more: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, *args, **more)

    return [
        mock.patch.object(F, "dropout", dropout),
        mock.patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention),
    ]
