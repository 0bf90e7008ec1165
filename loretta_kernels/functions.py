"""The public functions: they check their arguments and make one call of the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loretta_kernels import reference
from loretta_kernels._autocast import cast, off
from loretta_kernels.call import Call
from loretta_kernels.groups import Groups, check_index
from loretta_kernels.operator import apply, apply_cached
from loretta_kernels.reference import ACTIVATIONS
from loretta_kernels.shape import TTShape
from loretta_kernels.train import TT

_DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def tt_linear(x: Tensor, train: TT, *, index: Groups | Tensor | None = None) -> Tensor:
    """y = x · W + b for a tensor train, through its waist: W is never formed.

    Args:
        x: `[..., train.shape.in_features]`, fp64, fp32, bf16 or fp16, any strides, any number of rows (none included).
        train: the matrix and its bias.
        index: of a stack of trains, as `tt_adapter`; y is 0 where it is -1.

    Returns:
        `[..., train.shape.out_features]` in x's dtype; under autocast in autocast's, to which x is cast. Sums are in
        fp32 (fp64 for fp64). Saved for backward: x and the waist activations `[N, K]`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.
        RuntimeError: tensors on different devices; the backend asked for cannot serve.

    Example:
        >>> shape = TTShape.for_matrix(768, 64, rank=5)
        >>> cores = torch.randn(shape.num_params, requires_grad=True)
        >>> tt_linear(torch.randn(2, 3, 768), TT(cores, shape)).shape
        torch.Size([2, 3, 64])

    Source: LoRETTA (NAACL 2024, arXiv 2402.11417) tensorises layers, the classifier among them, this way.
    """
    adapters = None if index is None else check_stack("train", train)
    check_train("train", train, adapters)
    check_x(x, train.shape)
    index = _index(index, x, adapters)
    _check_devices(x, {"train": train}, index=index)
    return apply(Call(cast(x), train.cores, train.bias, None, None, None, None, None, index, train.shape, None))


def tt_adapter(
    x: Tensor,
    down: TT,
    up: TT,
    *,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    index: Groups | Tensor | None = None,
) -> Tensor:
    """y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up), both matrices tensor trains.

    Args:
        x: `[..., I]`, fp64, fp32, bf16 or fp16, any strides, any number of rows (none included).
        down, up: trains of `I x B` and `B x O`, each with or without a bias.
        activation: relu, gelu, gelu_tanh, silu, tanh or identity.
        scale: a number, or a one-element tensor, which can be learnt.
        residual: None for 0, x itself, or another tensor `[..., O]`.
        dropout_p: the probability, in [0, 1) and to the nearest 1/65536, that an element of x is dropped on its way
            down (not in the residual).
        seed: which elements: an int or a one-element int64 tensor; None draws one from the RNG of x's device, so that
            `torch.manual_seed` and checkpointing reproduce a run. One seed drops the same elements on every device and
            in every backend. The mask is not stored: backward draws it again.
        index: makes the trains stacks of `adapters` trains each, cores `[adapters, num_params]` and biases
            `[adapters, out_features]`, of which every row of x uses one: int64 or int32 over the first of x's leading
            dimensions, as `[B]` or `[B, T]` for x `[B, T, I]`. -1 is no adapter: y is the residual, or 0. A learnt
            scale is `[adapters]`, or one element for all. `Groups.of(index, adapters)` sorts the rows once for all
            layers; a tensor is checked and sorted at each call, for which the host waits where it is on a GPU.

    Returns:
        `[..., O]` in the dtype to which x and residual promote. Under autocast x is cast to autocast's dtype first, as
        `nn.Linear` does, and with it a residual that is x; another residual keeps its dtype and so its precision. Sums
        are in fp32 (fp64 for fp64). Saved for backward: x and the waist activations `[N, K]`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.
        RuntimeError: tensors on different devices; the backend asked for cannot serve.

    Example:
        >>> down, up = TTShape.for_matrix(4096, 64, rank=5), TTShape.for_matrix(64, 4096, rank=5)
        >>> down_cores, up_cores = torch.randn(down.num_params), torch.zeros(up.num_params)
        >>> x = torch.randn(8, 4096)
        >>> y = tt_adapter(x, TT(down_cores, down), TT(up_cores, up), activation="gelu", residual=x)
        >>> torch.equal(y, x)
        True

    Source: LoRETTA_adp (NAACL 2024, arXiv 2402.11417), the tensorised adapter.
    """
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not dropout_p and index is None:
        y = apply_cached(x, down, up, activation, scale, residual)
        if y is not None:
            return y
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return _adapter(x, {"down": down, "up": up}, activation, scale, residual, dropout_p, seed, index)


def tt_lora(
    x: Tensor,
    a: TT,
    b: TT,
    *,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    index: Groups | Tensor | None = None,
) -> Tensor:
    """y = residual + scale · drop(x) · A · B, both matrices tensor trains.

    Args:
        x: `[..., I]`, fp64, fp32, bf16 or fp16, any strides, any number of rows (none included).
        a, b: trains of `I x r` and `r x O`, without biases.
        scale: LoRA's alpha / r: a number, or a one-element tensor, which can be learnt.
        residual: the frozen layer's output, `[..., O]`; None for 0; or x itself.
        dropout_p, seed, index: as `tt_adapter`.

    Returns:
        `[..., O]`, with dtype, autocast, precision and saved tensors as `tt_adapter`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.
        RuntimeError: tensors on different devices; the backend asked for cannot serve.

    Example:
        >>> a, b = TTShape.for_matrix(768, 8, rank=5), TTShape.for_matrix(8, 1024, rank=5)
        >>> a_cores, b_cores = torch.randn(a.num_params), torch.zeros(b.num_params)
        >>> x, linear = torch.randn(4, 768), torch.nn.Linear(768, 1024)
        >>> y = tt_lora(x, TT(a_cores, a), TT(b_cores, b), scale=2.0, residual=linear(x))

    Source: LoRETTA_rep (NAACL 2024, arXiv 2402.11417), the reparameterised update.
    """
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not dropout_p and index is None:
        y = apply_cached(x, a, b, "identity", scale, residual)
        if y is not None:
            return y
    for name, train in (("a", a), ("b", b)):
        if isinstance(train, TT) and train.bias is not None:
            raise ValueError(f"{name} must have no bias in tt_lora; tt_adapter with the identity takes one")
    return _adapter(x, {"a": a, "b": b}, "identity", scale, residual, dropout_p, seed, index)


def tt_matrix(train: TT) -> Tensor:
    """The matrix `W [in_features, out_features]` that a tensor train stands for, for merging and export.

    Args:
        train: its cores may have any floating-point dtype; its bias is ignored.

    Returns:
        `[I, O]` in the dtype of the cores, computed in fp32 or better; differentiable.

    Raises:
        TypeError, ValueError: a train of the wrong kind or size.

    Example:
        >>> shape = TTShape.for_matrix(4096, 64, rank=5)
        >>> tt_matrix(TT(torch.randn(shape.num_params), shape)).shape
        torch.Size([4096, 64])

    Source: LoRETTA (NAACL 2024, arXiv 2402.11417), its tensor-train format.
    """
    check_train("train", train)
    wide = torch.promote_types(train.cores.dtype, torch.float32)
    with off(train.cores.device):
        return reference.tt_matrix(TT(train.cores.to(wide), train.shape)).to(train.cores.dtype)


def _adapter(
    x: Tensor,
    trains: dict[str, TT],
    activation: str,
    scale: float | Tensor,
    residual: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    index: Groups | Tensor | None,
) -> Tensor:
    """What `tt_adapter` and `tt_lora` share: the checks and the call."""
    adapters = None if index is None else check_stack(*next(iter(trains.items())))
    for name, train in trains.items():
        check_train(name, train, adapters)
    down, up = trains.values()
    check_x(x, down.shape)
    if down.shape.out_features != up.shape.in_features:
        raise ValueError(
            f"the first train gives {down.shape.out_features} features, the second takes {up.shape.in_features}"
        )
    if residual is not None:
        _check_dtype("residual", residual)
        wanted = [*x.shape[:-1], up.shape.out_features]
        if list(residual.shape) != wanted:
            raise ValueError(f"residual must be {wanted}, as the output is, got {list(residual.shape)}")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}")
    learnt_scale = None
    if isinstance(scale, Tensor):
        _check_dtype("scale", scale)
        if scale.numel() != 1 and (adapters is None or list(scale.shape) != [adapters]):
            of_each = "" if adapters is None else f", or [{adapters}], one for each adapter"
            raise ValueError(f"scale must be a number or a one-element tensor{of_each}, got {list(scale.shape)}")
        learnt_scale, scale = scale.to(x.device), 1.0
        if adapters is not None:
            learnt_scale = learnt_scale.reshape(-1).expand(adapters)
    residual_is_x = residual is x
    index = _index(index, x, adapters)
    _check_devices(x, trains, residual, index)
    x, residual = cast(x), None if residual_is_x else residual
    drawn = _seed(seed, x.device) if dropout_p else None
    operands = down.cores, down.bias, up.cores, up.bias, learnt_scale, drawn, residual, index
    constants = down.shape, up.shape, residual_is_x, float(scale), activation, float(dropout_p)
    return apply(Call(x, *operands, *constants))


def check_x(x: Any, shape: TTShape) -> None:
    """Raise unless x is `[..., in_features]` of a dtype that is computed with."""
    _check_dtype("x", x)
    if x.dim() == 0 or x.shape[-1] != shape.in_features:
        raise ValueError(f"x must be [..., {shape.in_features}] for {shape}, got {list(x.shape)}")


def check_stack(name: str, stack: Any) -> int:
    """How many trains are stacked; raise unless it is a stack."""
    cores = stack.cores if isinstance(stack, TT) else None
    if not isinstance(cores, Tensor) or cores.dim() != 2:
        found = list(cores.shape) if isinstance(cores, Tensor) else type(stack).__name__
        raise ValueError(f"with an index, {name} must be a TT with cores [adapters, num_params], got {found}")
    return cores.shape[0]


def _index(index: Groups | Tensor | None, x: Tensor, adapters: int | None) -> Tensor | None:
    """The index as a tensor; raise unless it is for these adapters and for the first of x's leading dimensions."""
    if isinstance(index, Groups):
        if index.adapters != adapters:
            raise ValueError(f"index groups {index.adapters} adapters, but {adapters} are stacked")
        index = index.index
    if index is None:
        return None
    check_index(index)
    lead = list(x.shape[:-1])
    if index.dim() > len(lead) or list(index.shape) != lead[: index.dim()]:
        raise ValueError(f"index must have the first of x's leading dimensions {lead}, got {list(index.shape)}")
    return index


def check_train(name: str, train: Any, adapters: int | None = None) -> None:
    """Raise unless the train's tensors have the sizes of its shape; of a stack, those of so many trains."""
    if not isinstance(train, TT):
        raise TypeError(f"{name} must be a TT(cores, shape, bias=None), got {type(train).__name__}")
    if not isinstance(train.shape, TTShape):
        raise TypeError(f"the shape of {name} must be a TTShape, got {type(train.shape).__name__}")
    lead = [] if adapters is None else [adapters]
    _check_sizes(f"the cores of {name}", train.cores, [*lead, train.shape.num_params])
    if train.bias is not None:
        _check_sizes(f"the bias of {name}", train.bias, [*lead, train.shape.out_features])


def _check_sizes(name: str, tensor: Any, sizes: list[int]) -> None:
    _check_dtype(name, tensor)
    if list(tensor.shape) != sizes:
        raise ValueError(f"{name} must be {sizes}, got {list(tensor.shape)}")


def _check_dtype(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be fp64, fp32, bf16 or fp16, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")


def _check_devices(
    x: Tensor, trains: dict[str, TT], residual: Tensor | None = None, index: Tensor | None = None
) -> None:
    """Raise unless all tensors are on one device."""
    device = x.device
    for train in trains.values():
        if train.cores.device != device or (train.bias is not None and train.bias.device != device):
            break
    else:
        if all(t is None or t is x or t.device == device for t in (residual, index)):
            return
    named: dict[str, Tensor | None] = {"x": x}
    for name, train in trains.items():
        named |= {f"cores of {name}": train.cores, f"bias of {name}": train.bias}
    named |= {"residual": residual, "index": index}
    found = ", ".join(f"{name} is on {t.device}" for name, t in named.items() if t is not None)
    raise RuntimeError(f"all tensors must be on one device, but {found}")


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a one-element int64 tensor on a device; None draws one from that device's RNG.

    So the host does not wait for a GPU, and a CUDA graph draws another one at every replay.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be an int or a one-element int64 tensor, got {seed.dtype} {list(seed.shape)}")
        return seed.to(device)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an int of 64 bits or a one-element int64 tensor, got {seed!r}")
    return torch.full((), int(seed), dtype=torch.int64, device=device)
