"""What the kernels will do for a shape, in words and numbers; it needs no GPU and runs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from loretta_kernels._dispatch import why_no_triton
from loretta_kernels.shape import TTShape

if TYPE_CHECKING:
    from loretta_kernels._triton.plan import Blocks, Plan


def explain(
    shape: TTShape, up_shape: TTShape | None = None, *, lora: bool | None = None, dtype: torch.dtype = torch.bfloat16,
    rows: int = 8192, arch: str = "sm_90", adapters: int = 0, registers: bool = False,
) -> None:  # fmt: skip
    """Print what serves a shape here, and how the kernels do: each side, the two launches, their bytes and operations.

    Args:
        shape: the train of `tt_linear`, or the first train of `tt_adapter` or `tt_lora`.
        up_shape: their second train.
        lora: whether it is `tt_lora`, whose residual is not x; by default where y has not as many features as x.
        dtype: that of x.
        rows: how many rows x has.
        arch: the architecture to plan for: sm_80, sm_90, sm_100, sm_120, gfx942.
        adapters: so many are stacked, and rows use them in turn (`index=` of the operators); 0: one adapter for all.
        registers: compile the two kernels, some ten seconds, and tell what they take of a multiprocessor.

    Raises:
        ValueError: the second train does not take what the first one gives; fewer than 0 adapters.
        RuntimeError: `registers` in Triton's interpreter.

    Example:
        >>> explain(TTShape.for_matrix(768, 64, rank=5), TTShape.for_matrix(64, 768, rank=5))
        served here by ...
    """
    if registers and os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("registers: the kernels cannot be compiled where TRITON_INTERPRET=1")
    if up_shape is not None and up_shape.in_features != shape.out_features:
        raise ValueError(
            f"the first train gives {shape.out_features} features, the second takes {up_shape.in_features}"
        )
    if adapters < 0:
        raise ValueError(f"adapters must be 0 or more, got {adapters}")
    if lora is None:
        lora = up_shape is not None and up_shape.out_features != shape.in_features
    reason = why_no_triton() or (None if torch.cuda.is_available() else "there is no GPU")
    print("served here by " + ("the Triton kernels" if reason is None else f"PyTorch: {reason}"))
    print("\n".join(_lines(shape, up_shape, lora, dtype, rows, arch, adapters)))
    if registers:
        print("\n".join(_usage(shape, up_shape, lora, dtype, rows, arch, adapters)))


def _lines(
    shape: TTShape, up_shape: TTShape | None, lora: bool, dtype: torch.dtype, N: int, arch: str, adapters: int
) -> Iterator[str]:
    """The lines of the explanation."""
    from loretta_kernels._triton.plan import MULTIPROCESSORS, plan_of

    size, residual_is_x = dtype.itemsize, up_shape is not None and not lora
    plan = plan_of(shape, up_shape, size, arch, residual_is_x)
    if adapters:  # which the streamed form serves
        plan = plan.streamed
    name = "y = x · W + b"
    if up_shape:
        name = "y = residual + x · A · B" if lora else "y = x + act(x · W_down + b_down) · W_up + b_up"
    of_adapters = f" of {adapters} stacked adapters in turn" if adapters else ""
    yield f"{name} for {N} rows{of_adapters} in {str(dtype).removeprefix('torch.')} on {arch}"
    for title, side in zip(("L_down", "R_down", "L_up", "R_up") if up_shape else ("L", "R"), plan.sides, strict=True):
        block = plan.forward.c if side.size > plan.block_b or not up_shape else plan.block_b
        factors = f"heavy {side.A} x {side.heavy_size} x {side.K}"
        if side.has_light:
            factors = f"light {side.light_size} x {side.A} · {factors}"
        yield f"  {title} [{side.size} x {side.K}] = {factors}: {side.form(block)}"
    flops = sum(2 * N * side.size * side.K for side in plan.sides)
    for kernel, blocks, (programs, moved, compulsory) in zip(
        ("forward", "backward"),
        (
            plan.one_pass_of(N, MULTIPROCESSORS) or plan.forward_of(max(_groups(N, adapters))),
            plan.one_pass_backward or plan.backward_of(N),
        ),
        traffic(plan, shape, up_shape, lora, size, N, adapters),
        strict=True,
    ):
        yield f"  {kernel}: {programs} programs of {blocks.warps} warps, {blocks.words}, {blocks.stages} stages"
        yield (
            f"    {_bytes(moved)} moved, {moved / max(1, compulsory):.2f} times the compulsory "
            f"{_bytes(compulsory)}; {flops * (1 if kernel == 'forward' else 2) / 1e9:.3g} Gflop"
        )
    if plan.one_pass_backward:
        words = plan.backward_of(N).words
        dropping = plan_of(shape, up_shape, size, arch, residual_is_x, has_dropout=True).one_pass_backward
        if dropping is not None and dropping != plan.one_pass_backward:
            yield f"    with dropout: {dropping.words}"
        with_dropout = "" if dropping else "dropout, "
        yield f"    with {with_dropout}a learnt scale or deterministic algorithms: {words}"
    of_each = " for each adapter" if adapters else ""
    yield f"  tables of {_bytes(4 * plan.table_size)} a program; sums of {_bytes(4 * plan.grad_size)}{of_each}"


def _groups(N: int, adapters: int) -> list[int]:
    """The rows of each adapter that has any, where they take the rows in turn."""
    return [N // adapters + (a < N % adapters) for a in range(min(adapters, N))] or [N]


def _usage(
    shape: TTShape, up_shape: TTShape | None, lora: bool, dtype: torch.dtype, N: int, arch: str, adapters: int
) -> Iterator[str]:
    """What the compiled kernels take."""
    from loretta_kernels._triton.compiled import compiled, usage
    from loretta_kernels._triton.planned import planned

    operator = "tt_linear" if up_shape is None else "tt_lora" if lora else "tt_adapter"
    shapes = (shape, up_shape) if up_shape else (shape,)
    for launch in planned(operator, shapes, dtype, N, arch=arch, adapters=adapters):
        kernel = compiled(launch, arch)
        registers, local = usage(kernel)
        name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        shared = _bytes(kernel.metadata.shared)
        yield f"  {name}: {registers} registers, {local} bytes spilled, {shared} of shared memory"


def traffic(
    plan: Plan, shape: TTShape, up_shape: TTShape | None, lora: bool, itemsize: int, N: int, adapters: int = 0
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of forward and backward: programs, bytes that they move, and those of them that must be.

    Of activations every access counts; tables and parameters, which stay in L1, count once for each program.
    """
    from loretta_kernels._triton.plan import MULTIPROCESSORS

    first, last = plan.sides[0], plan.sides[-1]
    I, O, waist = itemsize * N * first.size, itemsize * N * last.size, 4 * N * first.K
    adapts = up_shape is not None and not lora
    cores = 4 * (shape.num_params + (up_shape.num_params if up_shape else 0))
    down_bias, up_bias = 4 * shape.out_features if adapts else 0, 0 if lora else 4 * last.size
    tables = 2 * 4 * plan.table_size + cores  # made from the cores, stored, and loaded

    residual, groups = O if up_shape else 0, _groups(N, adapters)

    def shared_by(blocks: Blocks) -> int:
        if adapters:
            return sum(-(-rows // blocks.n) for rows in groups)
        return plan.programs(N, blocks)

    if form := plan.one_pass_of(N, MULTIPROCESSORS):
        parts, programs = 1, form.programs(N, MULTIPROCESSORS)
        again = 0 if adapts and form.same_matrix else residual
        made = 2 * 4 * form.table_size + cores
    else:
        blocks = plan.forward_of(max(groups))
        parts = plan.parts(N, blocks, last)
        programs, again, made = shared_by(blocks) * parts, residual, tables
    moved = parts * I + again + O + waist + programs * (made + down_bias) + programs // parts * up_bias
    forward = programs, moved, I + O + (residual if lora else 0)

    again = O if adapts else 0  # dy, for dx
    if form := plan.one_pass_backward:
        parts, programs = 1, form.programs(N, MULTIPROCESSORS)
        again = 0 if form.same_matrix else again
        sums = 4 * (form.kept.sums_end * -(-N // form.n) + form.kept.sums * programs)
        made = 2 * 4 * form.kept.end + cores
    else:
        blocks = plan.backward_of(N)
        parts = plan.parts(N, blocks, first, last)
        programs = shared_by(blocks) * parts
        sums, made = 4 * plan.grad_size * sum(-(-rows // blocks.n) for rows in groups), tables
    moved = parts * (O + waist) + 2 * I + again + sums + programs * (made + down_bias)
    return forward, (programs, moved, 2 * I + O)


def _bytes(size: float) -> str:
    """A size for the reader."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
