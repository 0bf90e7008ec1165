"""explain: what will run, in words and numbers."""

from __future__ import annotations

from math import prod

import pytest
import torch

from loretta_kernels import TTShape, explain
from loretta_kernels._triton.planned import planned

DOWN, UP = TTShape.for_matrix(4096, 64, 5), TTShape.for_matrix(64, 4096, 5)


def test_names_the_factors_the_launches_and_the_compulsory_bytes(capsys):
    explain(DOWN, UP)
    text = capsys.readouterr().out
    assert "L_down [4096 x 5] = light 256 x 5 · heavy 5 x 16 x 5" in text
    assert "forward: 132 programs of 8 warps, 8 whole rows at a time, 16 x 256 in and 16 x 256 out" in text
    assert "backward: 132 programs of 8 warps, 4 whole rows at a time, 16 x 256 in and 16 x 256 out" in text
    assert "with dropout, a learnt scale or deterministic algorithms: 64 rows and 64 features at a time" in text
    assert "compulsory 134 MB" in text
    assert "compulsory 201 MB" in text


def test_names_the_rows_that_the_backward_takes_with_dropout(capsys):
    explain(TTShape.for_matrix(4096, 8, 5), TTShape.for_matrix(8, 4096, 5), lora=True)
    text = capsys.readouterr().out
    assert "backward: 132 programs of 8 warps, 4 whole rows at a time" in text
    assert "with dropout: 2 whole rows at a time" in text
    assert "with a learnt scale or deterministic algorithms: 64 rows" in text


@pytest.mark.parametrize(("rows", "adapters"), [(8192, 3), (512, 64), (5, 64), (0, 2)])
def test_of_stacked_adapters_it_names_what_is_launched(rows, adapters, capsys):
    explain(DOWN, UP, rows=rows, adapters=adapters)
    text = capsys.readouterr().out
    assert f"for {rows} rows of {adapters} stacked adapters in turn in bfloat16" in text
    launches = planned("tt_adapter", (DOWN, UP), N=rows, adapters=adapters)
    assert len(launches) == (2 if rows else 0)
    for launch in launches:
        kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        blocks = f"{launch.constants['BLOCK_N']} rows and {launch.constants['BLOCK_C']} features at a time"
        assert f"{kernel}: {prod(launch.grid)} programs of {launch.options()['num_warps']} warps, {blocks}" in text


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("rank", [1, 5, 16, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 768, 4096, 4099, 53248])
def test_every_shape_has_a_plan(size, dtype, rank, arch, capsys):
    explain(TTShape.for_matrix(size, 8, rank), TTShape.for_matrix(8, size, rank), dtype=dtype, rows=1, arch=arch)
    explain(TTShape.for_matrix(size, size, rank), dtype=dtype, arch=arch)
    assert capsys.readouterr().out.count("backward") == 2


def test_rejects_a_negative_number_of_adapters():
    with pytest.raises(ValueError, match="adapters must be 0 or more, got -1"):
        explain(DOWN, UP, adapters=-1)


def test_rejects_trains_that_do_not_meet():
    with pytest.raises(ValueError, match="the first train gives 64 features, the second takes 4096"):
        explain(DOWN, DOWN)
