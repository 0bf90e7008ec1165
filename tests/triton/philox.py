"""Philox4x32-10 (Salmon et al., SC 2011) in numpy, and the dropout mask that the kernels draw from it."""

from __future__ import annotations

import numpy as np
import torch

WORD = np.uint64(0xFFFFFFFF)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four 32-bit words for every counter `[..., 4]`."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        low, high = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high & WORD, low >> 32 ^ c[3] ^ k[1], low & WORD]
        k = [(word + weyl) & WORD for word, weyl in zip(k, WEYL, strict=True)]
    return np.stack(c, -1)


def kernel_mask(rows: int, columns: int, p: float, seed: int) -> torch.Tensor:
    """What the kernels multiply x `[rows, columns]` by: word column % 4 of the counter (row, 0, column // 4, 0)."""
    counter = np.zeros((rows, -(-columns // 4), 4), np.uint64)
    counter[..., 0], counter[..., 2] = np.arange(rows)[:, None], np.arange(counter.shape[1])[None, :]
    key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    words = philox(counter, key).reshape(rows, -1)[:, :columns]
    kept = (words >> np.uint64(1)) >= np.uint64(int(p * 2**31))
    return torch.from_numpy(kept) / (1 - p)
