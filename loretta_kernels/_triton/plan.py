"""What the kernels are launched with: plain Python, no torch.

A program takes BLOCK_N rows, makes the tables of every side, and walks over the features BLOCK_C at a time. With few
rows, `parts` programs share the features of a block, so that one token does not run on one multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

from loretta_kernels._triton.row_side import Kept, RowSide, kept, row_sides
from loretta_kernels._triton.side import KEPT, Side, next_power_of_2, round_up, sides
from loretta_kernels.shape import TTShape

MAX_PROGRAMS = 1024  # more blocks of rows than this are taken in turn, with the tables made once
MAX_WORKSPACES = 128  # deterministic: as many sums, each of them a program's own
MULTIPROCESSORS = 132  # of an H100
FEW_ROWS = 64
X_TILE, Y_TILE = 32768, 131072  # elements of whole rows: x lies in shared memory, y is made 64 features at a time
MAX_PARTS = 64


@dataclass(frozen=True)
class Blocks:
    """Block sizes and compiler options of one kernel."""

    n: int
    c: int
    warps: int
    stages: int

    @property
    def words(self) -> str:
        """In words."""
        return f"{self.n} rows and {self.c} features at a time"


@dataclass(frozen=True)
class Sides:
    """The sides of an operator in the order of the computation."""

    sides: tuple[Side, ...]

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
    def table_size(self) -> int:
        """fp32 elements of a program's tables."""
        return max(32, self.sides[-1].table_end)


@dataclass(frozen=True)
class OnePass(Sides):
    """How an operator runs that keeps whole rows on the chip.

    Args:
        sides: narrower than those of `Plan`.
        n: rows at a time.
        i, o: inner features of x and of y that one product takes.
        warps, stages: the compiler's options.
        resident: programs on a multiprocessor.
    """

    sides: tuple[RowSide, ...]
    n: int
    i: int
    o: int
    warps: int
    stages: int
    resident: int = 1

    def programs(self, N: int, multiprocessors: int) -> int:
        """How many programs share the rows: each makes its tables once."""
        return min(-(-N // self.n), self.resident * multiprocessors)

    @cached_property
    def kept(self) -> Kept:
        """Where the backward's tables and sums lie."""
        return kept(self.sides)

    @cached_property
    def grad_size(self) -> int:
        """fp32 elements of the backward's sums, and of the count of the programs that are done."""
        return round_up(self.kept.sums + self.kept.sums_end + 1, 32)

    @cached_property
    def scratch_size(self) -> int:
        """fp32 elements that the contraction of the core gradients needs, one factor at a time."""
        factors = (side.factors for side in self.sides)
        return max(factor.chain_grads[-1] for of_side in factors for factor in of_side)

    @cached_property
    def levels(self) -> int:
        """Cores of the longest factor."""
        return max(side.levels for side in self.sides)

    @property
    def words(self) -> str:
        """In words."""
        first, last = self.sides[0], self.sides[-1]
        shapes = f"{first.outer} x {first.inner} in and {last.outer} x {last.inner} out"
        return f"{self.n} whole rows at a time, {shapes}, by {self.i} and {self.o} features"

    @property
    def same_matrix(self) -> bool:
        """Whether rows of x and of y are the same matrix, so that x is a residual that needs no second reading."""
        first, last = self.sides[0], self.sides[-1]
        return (first.outer, first.inner, self.i) == (last.outer, last.inner, self.o)


@dataclass(frozen=True)
class Plan(Sides):
    """How one operator runs: its sides in the order of the computation, and the blocks of its kernels.

    `few` are those of the forward of at most a block of so many rows, as in decoding; `few_backward` those of the
    backward of so few that programs share the features. Where they are given, `one_pass` takes the forward's place,
    `one_pass_few` where a multiprocessor has at most one block of rows, and `one_pass_backward` the backward's, but
    for the gradient of a learnt scale.
    """

    arch: str
    few: Blocks
    forward: Blocks
    few_backward: Blocks
    backward: Blocks
    one_pass: OnePass | None = None
    one_pass_few: OnePass | None = None
    one_pass_backward: OnePass | None = None

    @property
    def streamed(self) -> Plan:
        """The plan without the forms that keep whole rows on the chip."""
        return replace(self, one_pass=None, one_pass_few=None, one_pass_backward=None)

    def one_pass_of(self, N: int, multiprocessors: int) -> OnePass | None:
        """The form of the forward of N rows."""
        few = self.one_pass_few
        return few if few is not None and N <= few.n * multiprocessors else self.one_pass

    @cached_property
    def block_b(self) -> int:
        """Features of the bottleneck taken at a time."""
        most = 64 if self.arch.startswith("sm_10") else 32  # more take 40 registers more; fewer do not compile there
        return min(most, self.backward.c, max(16, next_power_of_2(self.sides[1].size)))

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
def plan_of(
    down: TTShape, up: TTShape | None, itemsize: int, arch: str, residual_is_x: bool = True, has_dropout: bool = False
) -> Plan:
    """The plan of one train, or of two."""
    first = sides(down)
    all_sides = first if up is None else (*first, *sides(up, first[-1].table_end, first[-1].grad_end))
    one_pass = _one_pass(row_sides(down, up), itemsize, arch)
    few, backward = None, None
    if one_pass is not None:
        few, backward = _one_pass_few(one_pass), _one_pass_backward(one_pass, residual_is_x, has_dropout)
    streamed = _plan(all_sides, itemsize, arch)
    return replace(streamed, one_pass=one_pass, one_pass_few=few, one_pass_backward=backward)


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that a program may take: CUDA C++ Programming Guide, AMD Instinct MI300 ISA."""
    return 1024 * _SHARED_KB.get(arch, 64)


_SHARED_KB = {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227} | dict.fromkeys(
    ("sm_86", "sm_89", "sm_120", "sm_121"), 99
)


@dataclass(frozen=True)
class Row:
    """Block sizes for a class of calls; None where a condition does not matter.

    Args:
        arch: what the architecture's name starts with.
        itemsize: bytes of an element of rows, 2 or 4.
        rank: "low" for waists up to 15 and inner bonds up to 8, "middle" for waists up to 31, "high" above.
        trains: one (tt_linear) or two.
        bond, bottleneck: the least inner bond, and the least bottleneck, that the row is for.
        decoding, few_backward: blocks of `Plan` that differ from `forward` and `backward`.
        why: what larger blocks, or blocks of another form, were seen to cost.
    """

    arch: str | None
    itemsize: int
    rank: str
    forward: Blocks
    backward: Blocks
    trains: int | None = None
    bond: int = 0
    bottleneck: int = 0
    decoding: Blocks | None = None
    few_backward: Blocks | None = None
    why: str = ""

    def serves(self, arch: str, itemsize: int, rank: str, trains: int, bond: int, bottleneck: int) -> bool:
        """Whether the row is for such calls."""
        return (
            (self.arch is None or arch.startswith(self.arch))
            and (self.itemsize, self.rank) == (itemsize, rank)
            and self.trains in (None, trains)
            and bond >= self.bond
            and bottleneck >= self.bottleneck
        )


# The first row that serves a call counts. bench.resources checks every row: no class of shapes may spill.
ROWS = (
    Row("gfx", 2, "low", Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 1)),
    Row("gfx", 2, "middle", Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 1)),
    Row("gfx", 2, "high", Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    Row("gfx", 4, "low", Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1)),
    Row("gfx", 4, "middle", Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    Row("gfx", 4, "high", Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    Row("sm_12", 2, "low", Blocks(64, 64, 8, 1), Blocks(64, 32, 8, 2), trains=2,
        decoding=Blocks(16, 64, 4, 1), few_backward=Blocks(64, 32, 8, 2), why="more stages spill"),
    Row("sm_12", 2, "low", Blocks(64, 64, 8, 1), Blocks(32, 64, 4, 2), trains=1,
        decoding=Blocks(16, 64, 4, 1), few_backward=Blocks(64, 32, 8, 2), why="more stages spill"),
    Row("sm_12", 2, "middle", Blocks(64, 32, 8, 1), Blocks(64, 64, 8, 1), why="64 features forward spill"),
    Row("sm_8", 2, "low", Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), trains=1),
    Row("sm_8", 2, "low", Blocks(64, 64, 4, 3), Blocks(64, 32, 8, 2), bond=6, why="64 features backward spill"),
    Row("sm_8", 2, "low", Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), bottleneck=17,
        few_backward=Blocks(32, 64, 8, 2), why="the compiler stops at 128 registers, and spills"),
    Row("sm_8", 2, "low", Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2),
        few_backward=Blocks(64, 64, 8, 1), why="the compiler stops at 128 registers, and spills"),
    Row("sm_10", 2, "low", Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 3), trains=2, bottleneck=65,
        decoding=Blocks(16, 64, 4, 2), few_backward=Blocks(32, 64, 8, 2), why="8 warps for few rows spill"),
    Row("sm_10", 2, "low", Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 3), bottleneck=17,
        decoding=Blocks(16, 64, 4, 2), few_backward=Blocks(64, 32, 8, 2), why="8 warps for few rows spill"),
    Row("sm_10", 2, "low", Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 3),
        decoding=Blocks(16, 64, 4, 2), few_backward=Blocks(64, 32, 8, 2), why="three stages forward spill"),
    Row("sm_10", 2, "middle", Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 2), why="one stage backward spills"),
    Row("sm_10", 4, "low", Blocks(64, 32, 8, 1), Blocks(32, 16, 4, 1),
        why="at 64 rows the compiler fails when it splits fp32 products in three (triton 3.7.1)"),
    Row(None, 2, "low", Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 3),
        decoding=Blocks(16, 128, 4, 2), why="8 warps for few rows stop at 128 registers, and spill"),
    Row(None, 2, "middle", Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
    Row(None, 2, "high", Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    Row(None, 4, "low", Blocks(64, 32, 8, 1), Blocks(64, 16, 8, 1)),
    Row(None, 4, "middle", Blocks(32, 32, 8, 1), Blocks(32, 16, 4, 1)),
    Row(None, 4, "high", Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1),
        why="32 rows backward spill hundreds of bytes, and need more than 99 KiB of shared memory"),
)  # fmt: skip


def _plan(all_sides: tuple[Side, ...], itemsize: int, arch: str) -> Plan:
    """The plan by the table."""
    KP, A = max(side.KP for side in all_sides), max(side.A for side in all_sides)
    rank = "high" if KP > 32 else "low" if KP == 16 and A <= KEPT else "middle"
    key = arch, min(itemsize, 4), rank, len(all_sides) // 2, A, all_sides[1].size
    row = next(row for row in ROWS if row.serves(*key))
    few = row.decoding or row.forward
    # Few rows by so many features that a thread still loads 16 bytes at once.
    rows, threads = 16 if rank == "low" else 32, few.warps * (64 if arch.startswith("gfx") else 32)
    few = replace(few, n=rows, c=max(few.c, 16 * threads // (itemsize * rows)), stages=min(few.stages, 2))
    kernels = few, row.forward, row.few_backward or row.backward, row.backward
    few, forward, few_backward, backward = (_fitted(blocks, all_sides, itemsize, arch) for blocks in kernels)
    return Plan(all_sides, arch, few, forward, few_backward, backward)


def _one_pass(all_sides: tuple[RowSide, ...], itemsize: int, arch: str) -> OnePass | None:
    """The form that keeps whole rows on the chip, where it fits and nothing spills."""
    first, last = all_sides[0], all_sides[-1]
    if itemsize != 2 or arch != "sm_90" or not (first.is_cut and last.is_cut):
        return None  # other tensor cores want the factors in registers, where they do not fit
    if any(side.K > 8 or side.A > 8 for side in all_sides) or any(side.size > 128 for side in all_sides[1:-1]):
        return None
    if any(side.inner % 8 or side.inner < 16 for side in (first, last)):  # 16 bytes, and eight elements of a mask
        return None
    if len(all_sides) == 2 and max(first.levels, last.levels) > 2:
        return None  # no second reading to save, and factors of three cores cost more than they bring
    for n in (16, 8, 4, 2):
        if n * max(first.OP, last.OP) <= 256 and n * first.OP * first.IP <= X_TILE and n * last.OP * last.IP <= Y_TILE:
            return OnePass(all_sides, n, min(64, first.IP), min(64, last.IP), warps=8, stages=2)
    return None


def _one_pass_few(form: OnePass) -> OnePass | None:
    """That of few rows: half a block, by half the warps, takes less time from its first step to its last."""
    first = form.sides[0]
    if first.OP * first.IP >= 8192:
        return None  # so long a row spills with four warps, by Triton 3.6
    return replace(form, n=form.n // 2, warps=4)


def _one_pass_backward(form: OnePass, residual_is_x: bool, has_dropout: bool) -> OnePass | None:
    """The backward that keeps whole rows on the chip, of as many rows at a time as fit, without spills.

    What a block takes is the latency of its steps. Where rows are short there are two programs of four warps on a
    multiprocessor, which hide each other's.
    x and dy lie there twice, the next rows beside those at hand; a wide bottleneck, dy as a part of dx, and masks leave
    less room. With these limits no first-rate class spills on sm_90; other shapes may, by a few bytes.
    """
    first, last = form.sides[0], form.sides[-1]
    bottleneck = max((side.size for side in form.sides[1:-1]), default=0)
    is_wide, shortest, longest = bottleneck > 16, min(first.OP, last.OP), max(first.OP, last.OP)
    stages = 1 if _is_triton_3_6() else form.stages
    if max(first.CP, last.CP) > 32:
        return None  # sums for 64 pairs of a bond's and the waist's index spill
    if is_wide and has_dropout:
        return None  # so do masks beside the tables and the sums of a wide bottleneck
    if bottleneck <= 64 and 4 <= shortest and longest <= 16 and first.IP <= 128:
        if last.size <= (1024 if is_wide else 3072):
            stages = stages if not is_wide and first.IP + last.IP <= 192 else 1
            return replace(form, n=4, warps=4, stages=stages, resident=2)
    if has_dropout and not residual_is_x and 16 <= shortest and longest == 64 and max(first.IP, last.IP) <= 64:
        return replace(form, n=2, warps=4, stages=1, resident=2)
    if any(side.IP == 256 and side.inner % 64 for side in (first, last)):
        return None  # so does a last block of four that has to be masked
    if first.IP + last.IP > 640:
        return None  # so do sums for so many inner features
    rows, outer, elements = (8, 256, 32768) if is_wide or residual_is_x else (8, 512, 40960)
    if has_dropout:
        rows, outer, elements = 4, min(outer, 320), min(elements, 32768)
    if min(first.inner, last.inner) < 64:  # tiles of many rows
        rows, outer = 4, min(outer, 256)
    for n in (8, 4, 2):
        fits = n * (first.OP + last.OP) <= outer and n * (first.OP * first.IP + last.OP * last.IP) <= elements
        if n <= rows and fits and n * shortest >= 16:  # the least that a product sums
            return replace(form, n=n, stages=stages)
    return None


def _is_triton_3_6() -> bool:
    """Whether it is this version that compiles, with which the backward spills where the next rows are loaded ahead."""
    try:
        import triton
    except ImportError:
        return False
    version: str = triton.__version__
    return version.startswith("3.6.")


def _fitted(blocks: Blocks, all_sides: tuple[Side, ...], itemsize: int, arch: str) -> Blocks:
    """The blocks with no more features than there are, and no more stages than shared memory has room for.

    A stage is loaded ahead: rows, and for a side whose tiles are not made of rows in registers those of its tables.
    Beside the stages, a tile of fp32 passes from one layout to another.
    """
    blocks = replace(blocks, c=min(blocks.c, max(16, next_power_of_2(max(side.size for side in all_sides)))))
    stage = blocks.n * blocks.c * itemsize + max(side.loaded_bytes(blocks.c) for side in all_sides)
    room = shared_limit(arch) - 4 * blocks.n * blocks.c
    return replace(blocks, stages=max(1, min(blocks.stages, 1 + room // stage)))
