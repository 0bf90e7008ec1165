"""Dropout masks by Philox4x32-7: one seed, one mask, on every device and in every backend.

The element (row, column) of x is decided by 16 bits of the counter (row, row >> 32, column // 8, 0) under the key
`seed`: half `column % 2` of word `column % 8 // 2`. So a block of rows or columns can be drawn alone, and backward
draws again what forward drew. Seven rounds are the fewest that pass BigCrush.

Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC 2011), table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
COLUMNS = 8  # that share a counter
_WORD = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def threshold(p: float) -> int:
    """An element is dropped where its 16 bits, as a signed number, are below this: p to the nearest 1/65536."""
    return min(round(p * 2**16), 2**16 - 1) - 2**15


def dropout_factor(
    seed: Tensor, first_row: int, rows: int | Tensor, columns: int, p: float, dtype: torch.dtype
) -> Tensor:
    """What dropout multiplies rows of x by: 0, or 1 / (1 - p).

    Args:
        seed: one int64 element, on the device of the result.
        first_row, rows, columns: which block of x; or the numbers of its rows in the place of how many there are.

    Returns:
        `[rows, columns]` in `dtype`.
    """
    chances = random_bits(seed, first_row, rows, columns)
    factor = torch.empty(chances.shape, dtype=dtype, device=seed.device)
    return torch.ge(chances, threshold(p), out=factor).div_(1 - p)


def random_bits(seed: Tensor, first_row: int, rows: int | Tensor, columns: int) -> Tensor:
    """The 16 bits of each element, as int16 `[rows, columns]`.

    A round takes the words (c0, c1, c2, c3) and the key (k0, k1) to

        (hi(M1·c2) ^ c1 ^ k0, lo(M1·c2), hi(M0·c0) ^ c3 ^ k1, lo(M0·c0))

    Words are held in int64, where their products fit; the upper halves of c1 and c3 are not cleared, nor used.
    """
    device = seed.device
    # On a CPU arithmetic with a Python number is faster than with a one-element tensor; on a GPU it would synchronise.
    plain = type(seed) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(seed)
    key = int(seed) if plain and device.type == "cpu" else seed.reshape(())
    k0, k1 = key & _WORD, key >> 32 & _WORD
    row = torch.arange(first_row, first_row + rows, device=device) if isinstance(rows, int) else rows
    row = row[:, None]
    group = torch.arange(-(-columns // COLUMNS), device=device)[None, :]
    # In the first two rounds a word depends on the row or on the column, not on both: they are computed on vectors. The
    # others work in place, since allocating memory would cost more than they do.
    p0, p1 = (row & _WORD) * _M0, group * _M1
    c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ (row >> 32) ^ k0, p1, (p0 >> 32 & _WORD) ^ k1, p0
    k0, k1 = k0 + _W0 & _WORD, k1 + _W1 & _WORD
    words = torch.empty(6, len(row), group.shape[1], dtype=torch.int64, device=device)
    for word, start in zip(words, (c0, c1, c2, c3), strict=False):
        word.copy_(start)
    c0, c1, c2, c3, p0, p1 = words
    for _ in range(1, ROUNDS):
        torch.mul(c0, _M0, out=p0)
        torch.mul(c2, _M1, out=p1)
        for product, odd, k, even in ((p1, c1, k0, c0), (p0, c3, k1, c2)):
            torch.bitwise_right_shift(product, 32, out=even).bitwise_xor_(odd).bitwise_xor_(k).bitwise_and_(_WORD)
        c1, c3, p1, p0 = p1, p0, c1, c3
        k0, k1 = k0 + _W0 & _WORD, k1 + _W1 & _WORD
    pairs = torch.stack([c1.bitwise_left_shift_(32).bitwise_or_(c0), c3.bitwise_left_shift_(32).bitwise_or_(c2)], -1)
    return pairs.view(torch.int16).view(len(row), COLUMNS * group.shape[1])[:, :columns]
