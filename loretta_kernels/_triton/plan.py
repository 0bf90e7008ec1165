"""What the kernels are launched with: plain Python, no torch.

A program takes BLOCK_N rows, makes the tables of every side, and walks over the features BLOCK_C at a time. With few
rows, `parts` programs share the features of a block, so that one token does not run on one multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

from loretta_kernels._triton.side import KEPT, Side, next_power_of_2, round_up, sides
from loretta_kernels.shape import TTShape

MAX_PROGRAMS = 1024  # more blocks of rows than this are taken in turn, with the tables made once
MAX_WORKSPACES = 128  # deterministic: as many sums, each of them a program's own
FEW_ROWS = 64
MAX_PARTS = 64


@dataclass(frozen=True)
class Blocks:
    """Block sizes and compiler options of one kernel."""

    n: int
    c: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """How one operator runs: its sides in the order of the computation, and the blocks of its kernels.

    `few` are those of the forward of at most a block of so many rows, as in decoding; `few_backward` those of the
    backward of so few that programs share the features.
    """

    sides: tuple[Side, ...]
    arch: str
    few: Blocks
    forward: Blocks
    few_backward: Blocks
    backward: Blocks

    @cached_property
    def first(self) -> Side:
        """The side that takes x."""
        return self.sides[0]

    @cached_property
    def last(self) -> Side:
        """The side that gives y."""
        return self.sides[-1]

    @cached_property
    def named_sides(self) -> dict[str, Side | None]:
        """The sides by their names in the kernels; one train alone has no middle."""
        middle = self.sides[1:-1] or (None, None)
        return dict(zip(("LD", "RD", "LU", "RU"), (self.first, *middle, self.last), strict=True))

    @cached_property
    def block_b(self) -> int:
        """Features of the bottleneck taken at a time."""
        return min(self.backward.c, max(16, next_power_of_2(self.sides[1].size)))

    @cached_property
    def table_size(self) -> int:
        """fp32 elements of a program's tables."""
        return max(32, self.sides[-1].table_end)

    @cached_property
    def scratch_size(self) -> int:
        """fp32 elements that the contraction of the core gradients needs, one side at a time."""
        return max(side.chain_grads[-1] for side in self.sides)

    @cached_property
    def dscale(self) -> int:
        """Where the gradient of the scale is summed."""
        return self.sides[-1].grad_end

    @cached_property
    def arrived(self) -> int:
        """Where the programs that are done are counted."""
        return self.dscale + 1

    @cached_property
    def grad_size(self) -> int:
        """fp32 elements of the sums over rows."""
        return round_up(self.arrived + 1, 32)

    def precision(self, exact: bool) -> str:
        """How fp32 is multiplied: AMD's matrix cores take it as it is."""
        if self.arch.startswith("gfx"):
            return "ieee"
        return "tf32x3" if exact else "tf32"

    def forward_of(self, N: int) -> Blocks:
        """The blocks of the forward of N rows."""
        return self.few if N <= self.few.n else self.forward

    def backward_of(self, N: int) -> Blocks:
        """The blocks of the backward of N rows."""
        return self.few_backward if N <= FEW_ROWS else self.backward

    def programs(self, N: int, blocks: Blocks, most: int = MAX_PROGRAMS) -> int:
        """How many programs share the rows."""
        return max(1, min(-(-N // blocks.n), most))

    def parts(self, N: int, blocks: Blocks, *shared: Side) -> int:
        """How many programs share the features of these sides for a block of rows."""
        return min(-(-max(side.size for side in shared) // blocks.c), MAX_PARTS) if N <= FEW_ROWS else 1


@cache
def plan_of(down: TTShape, up: TTShape | None, itemsize: int, arch: str) -> Plan:
    """The plan of one train, or of two."""
    first = sides(down)
    return _plan(first if up is None else (*first, *sides(up, first[-1].table_end, first[-1].grad_end)), itemsize, arch)


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that a program may take: CUDA C++ Programming Guide, AMD Instinct MI300 ISA."""
    return 1024 * _SHARED_KB.get(arch, 64)


_SHARED_KB = {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227} | dict.fromkeys(
    ("sm_86", "sm_89", "sm_120", "sm_121"), 99
)


def _plan(all_sides: tuple[Side, ...], itemsize: int, arch: str) -> Plan:
    """The largest blocks that no class of shapes was seen to spill with; `bench.resources` checks them."""
    KP, A = max(side.KP for side in all_sides), max(side.A for side in all_sides)
    small = KP == 16 and A <= KEPT
    amd = arch.startswith("gfx")
    adapter, bottleneck = len(all_sides) == 4, all_sides[1].size
    few_forward = few_backward = None
    if KP > 32:
        forward = Blocks(32, 32, 4, 1)
        # In fp32 a backward of 32 rows spills hundreds of bytes, and needs more than 99 KiB of shared memory.
        backward = Blocks(16, 32, 4, 1) if itemsize > 2 and not amd else forward
    elif itemsize > 2 and amd:
        forward, backward = Blocks(64 if small else 32, 32, 4, 1), Blocks(32, 32, 4, 1)
    elif itemsize > 2:
        forward = Blocks(64 if small else 32, 32, 8, 1)
        # On sm_100 the compiler fails at 64 rows when it splits fp32 products in three (triton 3.7.1).
        backward = Blocks(64, 16, 8, 1) if small and not arch.startswith("sm_10") else Blocks(32, 16, 4, 1)
    elif not small and amd:
        forward, backward = Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 1)
    elif not small:
        forward, backward = Blocks(64, 32 if arch.startswith("sm_12") else 64, 8, 1), Blocks(64, 64, 8, 1)
    elif amd:
        forward, backward = Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 1)
    # Of what follows, some kernels are stopped by the compiler at 128 registers or fewer, and spill, in other blocks.
    elif arch.startswith("sm_12"):
        forward, backward = Blocks(64, 64, 8, 1), Blocks(64, 32, 8, 2) if adapter else Blocks(32, 64, 4, 2)
        few_forward, few_backward = Blocks(16, 64, 4, 1), Blocks(64, 32, 8, 2)
    elif arch.startswith("sm_8") and not adapter:
        forward, backward = Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)
    elif arch.startswith("sm_8") and A > 5:
        forward, backward = Blocks(64, 64, 4, 3), Blocks(64, 32, 8, 2)
    elif arch.startswith("sm_8"):
        forward = backward = Blocks(64, 64, 8, 2)
        few_backward = Blocks(32, 64, 8, 2) if bottleneck > 16 else Blocks(64, 64, 8, 1)
    elif arch.startswith("sm_10"):
        forward = backward = Blocks(64, 64, 8, 3)
        few_forward = Blocks(16, 64, 4, 2)
        few_backward = Blocks(32, 64, 8, 2) if adapter and bottleneck > 64 else Blocks(64, 32, 8, 2)
    else:
        forward, backward = Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 2)
    # Few rows by so many features that a thread still loads 16 bytes at once.
    few = few_forward or forward
    rows, threads = 16 if small else 32, few.warps * (64 if amd else 32)
    few = replace(few, n=rows, c=max(few.c, 16 * threads // (itemsize * rows)), stages=min(few.stages, 2))
    kernels = few, forward, few_backward or backward, backward
    return Plan(all_sides, arch, *(_fitted(blocks, all_sides, itemsize, arch) for blocks in kernels))


def _fitted(blocks: Blocks, all_sides: tuple[Side, ...], itemsize: int, arch: str) -> Blocks:
    """The blocks with no more features than there are, and no more stages than shared memory has room for.

    A stage is loaded ahead: rows, and for a side whose tiles are not made of rows in registers those of its tables.
    Beside the stages, a tile of fp32 passes from one layout to another.
    """
    blocks = replace(blocks, c=min(blocks.c, max(16, next_power_of_2(max(side.size for side in all_sides)))))
    stage = blocks.n * blocks.c * itemsize + max(side.loaded_bytes(blocks.c) for side in all_sides)
    room = shared_limit(arch) - 4 * blocks.n * blocks.c
    return replace(blocks, stages=max(1, min(blocks.stages, 1 + room // stage)))
