"""What the kernels will do for a shape, in words and numbers; it needs no GPU and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loretta_kernels.shape import TTShape


def explain(
    shape: TTShape, up_shape: TTShape | None = None, *, dtype: torch.dtype = torch.bfloat16, rows: int = 8192,
    arch: str = "sm_90",
) -> None:  # fmt: skip
    """Print how the kernels serve a shape: how each side is made, the two launches, their bytes and operations.

    Args:
        shape: the train of `tt_linear`, or the first train of `tt_adapter` or `tt_lora`.
        up_shape: their second train.
        dtype: that of x.
        rows: how many rows x has.
        arch: the architecture to plan for: sm_80, sm_90, sm_100, sm_120, gfx942.

    Raises:
        ValueError: the second train does not take what the first one gives.
    """
    if up_shape is not None and up_shape.in_features != shape.out_features:
        raise ValueError(
            f"the first train gives {shape.out_features} features, the second takes {up_shape.in_features}"
        )
    print("\n".join(_lines(shape, up_shape, dtype, rows, arch)))


def _lines(shape: TTShape, up_shape: TTShape | None, dtype: torch.dtype, N: int, arch: str) -> Iterator[str]:
    """The lines of the explanation."""
    from loretta_kernels._triton.plan import adapter_plan, linear_plan

    size = dtype.itemsize
    plan = adapter_plan(shape, up_shape, size, arch) if up_shape else linear_plan(shape, size, arch)
    name = "y = x + act(x · W_down + b_down) · W_up + b_up" if up_shape else "y = x · W + b"
    yield f"{name} for {N} rows in {str(dtype).removeprefix('torch.')} on {arch}"
    for title, side in zip(("L_down", "R_down", "L_up", "R_up") if up_shape else ("L", "R"), plan.sides, strict=True):
        block = plan.forward.c if side.size > plan.block_b or not up_shape else plan.block_b
        factors = f"heavy {side.A} x {side.heavy_size} x {side.K}"
        if side.has_light:
            factors = f"light {side.light_size} x {side.A} · {factors}"
        yield f"  {title} [{side.size} x {side.K}] = {factors}: {side.form(block)}"
    I, O, K = shape.in_features, (up_shape or shape).out_features, shape.waist
    tables, flops = 4 * plan.table_size, sum(2 * N * side.size * side.K for side in plan.sides)
    first, last = plan.sides[0], plan.sides[-1]
    for kernel, blocks, shared, compulsory, again in (
        ("forward", plan.forward_of(N), (last,), I + O, I if up_shape else 0),
        ("backward", plan.backward, (first, last), 2 * I + O, O if up_shape else 0),
    ):
        programs, parts = plan.programs(N, blocks), plan.parts(N, blocks, *shared)
        sums = 4 * plan.grad_size * -(-N // blocks.n) if kernel == "backward" else 0
        moved = N * (size * (compulsory + again) + 4 * K) + 2 * tables * programs * parts + sums
        yield (
            f"  {kernel}: {programs * parts} programs of {blocks.warps} warps, {blocks.n} rows and {blocks.c} features "
            f"at a time, {blocks.stages} stages"
        )
        yield (
            f"    {_bytes(moved)} moved, {moved / max(1, size * N * compulsory):.2f} times the compulsory "
            f"{_bytes(size * N * compulsory)}; {flops * (1 if kernel == 'forward' else 2) / 1e9:.3g} Gflop"
        )
    yield f"  tables of {_bytes(tables)} a program; sums of {_bytes(4 * plan.grad_size)}"


def _bytes(size: float) -> str:
    """A size for the reader."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
