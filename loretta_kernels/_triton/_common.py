"""What every kernel needs: products and casts that are right in the interpreter too, activations, dropout, sums."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def to_tf32(x):
    """x rounded to nearest; the tensor core would drop the low bits, so that long sums would be too small."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b in fp32; the interpreter would multiply the bits of bf16."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to nearest; the interpreter would truncate to bf16."""
    if INTERPRETED and DTYPE == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def tanh(x):
    """2 · sigmoid(2x) - 1, and below 1, where that cancels, five terms of Lambert's continued fraction."""
    x2 = x * x
    small = x * (945 + x2 * (105 + x2)) / (945 + x2 * (420 + x2 * 15))
    return tl.where(tl.abs(x) < 1, small, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def act(h, ACTIVATION: tl.constexpr):
    """a = act(h)."""
    if ACTIVATION == "relu":
        return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * h * (1 + tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))
    elif ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    elif ACTIVATION == "tanh":
        return tanh(h)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return h


@triton.jit
def dact(h, ACTIVATION: tl.constexpr):
    """act'(h)."""
    if ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, 1.0)  # 1 for NaN, as in PyTorch
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        return cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (h + 0.044715 * h * h * h))
        return 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * h * h)
    elif ACTIVATION == "silu":
        g = tl.sigmoid(h)
        return g * (1 + h * (1 - g))
    elif ACTIVATION == "tanh":
        t = tanh(h)
        return 1 - t * t
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(h.shape, 1.0, tl.float32)


@triton.jit
def kept_by_dropout(seed, low, high, c0, DROPPED: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of the elements (row, c0 .. c0 + BLOCK_C) of x dropout keeps, as `philox` says.

    Args:
        low, high: the rows [n, 1] in two words of 32 bits; one high word may serve all.
        c0: a multiple of 8, the same for all rows, or one for each.
    """
    oct = (c0 // 8 + tl.full([low.shape[0]], 0, tl.int32))[:, None] + tl.arange(0, BLOCK_C // 8)[None, :]
    oct = oct.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low + oct * 0, high + oct * 0, oct, oct * 0, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    return tl.join(words << 16 >> 16, words >> 16).reshape(low.shape[0], BLOCK_C) >= DROPPED


@triton.jit
def dropout_factor(seed, rows, c0, P: tl.constexpr, DROPPED: tl.constexpr, BLOCK_C: tl.constexpr):
    """What dropout multiplies the elements (row, c0 .. c0 + BLOCK_C) of x by: 0, or 1 / (1 - p)."""
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]
    return tl.where(kept_by_dropout(seed, low, high, c0, DROPPED, BLOCK_C), 1 / (1 - P), 0.0)


@triton.jit
def add_to(ptrs, value, mask, ATOMIC: tl.constexpr):
    """Add to fp32 sums: those of all programs by atomics, or those of this program alone."""
    if ATOMIC:
        tl.atomic_add(ptrs, value, mask=mask, sem="relaxed")
    else:
        tl.store(ptrs, tl.load(ptrs, mask=mask) + value, mask=mask)
