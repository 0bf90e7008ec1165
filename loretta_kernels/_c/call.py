"""A call of the library: its arguments as the C struct has them, and the memory it works in."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loretta_kernels._c.library import library
from loretta_kernels.shape import TTShape

ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "tanh": 5}


class Call(ctypes.Structure):
    """`Call` of adapter.c, where the fields are explained."""

    _fields_ = (
        *((name, c_int64) for name in ("N", "I", "B", "O", "x_bf16", "y_bf16", "residual_bf16")),
        *((name, c_int64) for name in ("activation", "residual_is_x", "needs", "threads")),
        ("cores", c_int64 * 2),
        ("cut", c_int64 * 2),
        ("modes", c_void_p * 2),
        ("ranks", c_void_p * 2),
        *((name, c_int64) for name in ("ldx", "ldy", "ldr")),
        ("seed", c_uint64),
        ("dropout_p", c_double),
        ("scale", c_float),
        *((name, c_void_p) for name in ("x", "residual", "dy", "down", "down_bias", "up", "up_bias", "waist", "y")),
        *((name, c_void_p) for name in ("dx", "ddown", "ddown_bias", "dup", "dup_bias", "dscale", "room")),
        ("room_size", c_int64),
    )


def new_call(x: Tensor, specs: tuple[tuple[int, ...], ...], *parameters: Tensor | None) -> Call:
    """A call with x and its dtype, the shapes of one train or two, and (down, down_bias, up, up_bias).

    Tensors that are made on the way stay with the call, which holds nothing but addresses otherwise.
    """
    call = Call.from_buffer_copy(_template(specs)[0])
    x, call.ldx = rows_of(x)
    call.N, call.x_bf16, call.threads = x.numel() // call.I, x.dtype is torch.bfloat16, torch.get_num_threads()
    call.x = x.data_ptr()
    given = [None if t is None else fp32(t) for t in parameters]
    call.down, call.down_bias, call.up, call.up_bias = map(address, given)
    call.kept = x, given
    return call


def run(call: Call, backward: bool) -> None:
    """Make the call, with the GIL released."""
    function = library().loretta_backward if backward else library().loretta_forward
    size = 0
    while True:
        room = _memory.at_least(size)
        call.room, call.room_size = room.data_ptr(), room.numel()
        size = function(ctypes.byref(call))
        if size == 0:
            return


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x `[..., I]` as rows whose features lie side by side, a view where it can be one, and from row to row how far."""
    if not x.is_contiguous():
        x = x.reshape(-1, x.shape[-1])
        if x.stride(1) == 1 or x.shape[1] == 1:
            return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


def address(t: Tensor | None) -> int | None:
    """Where a tensor's elements lie; NULL for None."""
    return None if t is None else t.data_ptr()


def fp32(t: Tensor) -> Tensor:
    """t dense and in fp32, itself where it is so."""
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.to(torch.float32).contiguous()


def fp32_room(size: Sequence[int]) -> Tensor:
    """Fresh memory, whatever torch's default dtype and device are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


class _Memory(threading.local):
    """What the calls of a thread work in: as much as the largest of them took."""

    def __init__(self) -> None:
        self._floats = fp32_room((0,))

    def at_least(self, size: int) -> Tensor:
        """So many floats, or more."""
        if self._floats.numel() < size:
            self._floats = fp32_room((size,))
        return self._floats


_memory = _Memory()


@cache
def _template(specs: tuple[tuple[int, ...], ...]) -> tuple[Call, list[Any]]:
    """A call that has the shapes alone, and the arrays that it points to."""
    shapes = [TTShape.from_spec(spec) for spec in specs]
    call, arrays = Call(I=shapes[0].in_features, O=shapes[-1].out_features, scale=1.0), []
    call.B = shapes[0].out_features if len(shapes) == 2 else 0
    for k, shape in enumerate(shapes):
        call.cores[k], call.cut[k] = len(shape.modes), shape.cut
        for field, numbers in ((call.modes, shape.modes), (call.ranks, shape.bond_ranks)):
            array = (c_int64 * len(numbers))(*numbers)
            field[k] = ctypes.addressof(array)
            arrays.append(array)
    return call, arrays
