"""The sizes that are measured: a quick set, and all of them."""

from __future__ import annotations

from bench.problems import Cell

ROWS = (1, 16, 128, 512, 2048, 8192, 16384)
ON_CPU = 2048
SIZES = (768, 2048, 4096, 5120, 8192)
RANKS = (5, 16)
WIDTHS = {"adp": 64, "rep": 8, "cls": 0}
COMPILED = 4096, 5  # where torch.compile takes part: it compiles for minutes where all sizes do


def cells(kind: str, grid: str, device: str) -> list[Cell]:
    """An operator's cells of the grid "quick" or "full"."""
    if grid == "quick":
        sizes = [(768, 5, 512)] if kind == "cls" else [(4096, 5, N) for N in ROWS if N <= ON_CPU]
        sizes += [] if kind == "cls" else [(768, 5, 512), (4096, 16, 512), (8192, 5, 128)]
        compiled = {(4096, 5, 512)}
    else:
        rows = [N for N in ROWS if device != "cpu" or N <= ON_CPU]
        sizes = [(d, rank, N) for d in SIZES for rank in RANKS for N in rows]
        compiled = {size for size in sizes if size[:2] == COMPILED}
    return [Cell(kind, d, WIDTHS[kind], rank, N, (d, rank, N) in compiled) for d, rank, N in sizes]
