"""Every golden file through the normal form, and the decompositions on their own."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import loretta_kernels
from loretta.convert.trains import normal_form
from loretta_kernels import TT, TTShape, reference
from loretta_kernels.svd import flat, tt_svd

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
ACTIVATIONS = {"gelu_new": "gelu_tanh"}


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    return meta, {name: torch.from_numpy(array).double() for name, array in arrays.items()}


def cores_of(tensors: dict[str, Tensor], train: str) -> list[Tensor]:
    found = {int(key.removeprefix(f"{train}.core")): key for key in tensors if key.startswith(f"{train}.core")
             and not key.endswith(".grad")}  # fmt: skip
    return [tensors[found[number]] for number in sorted(found)]


def converted(meta: dict, tensors: dict[str, Tensor], train: str) -> TT:
    """The normal form, with its bias."""
    sizes = meta[train]["in_features"], meta[train]["out_features"]
    cores, shape = normal_form(cores_of(tensors, train), *sizes)
    assert (shape.in_features, shape.out_features) == sizes
    return TT(flat(cores, torch.float64), shape, tensors.get(f"{train}.bias"))


def output(meta: dict, tensors: dict[str, Tensor]) -> Tensor:
    """y of a file by the operators, every train in its normal form."""
    x, weight, base_bias = tensors["x"], tensors.get("weight"), tensors.get("base_bias")
    kind = meta["kind"]
    if kind == "tt_linear":
        return loretta_kernels.tt_linear(x, converted(meta, tensors, "tt"))
    if kind in ("rep", "rep_layer"):
        a, b = (converted(meta, tensors, name) for name in "AB")
        residual = None if kind == "rep" else F.linear(x, weight, base_bias)
        return loretta_kernels.tt_lora(x, a, b, scale=meta["alpha"] / meta["r"], residual=residual)
    assert kind in ("adapter", "adp_layer")

    def adapted(z: Tensor) -> Tensor:
        down, up = converted(meta, tensors, "down"), converted(meta, tensors, "up")
        activation = ACTIVATIONS.get(meta["act"], meta["act"])
        return loretta_kernels.tt_adapter(z, down, up, activation=activation, scale=meta["scaling"], residual=z)

    if kind == "adapter":
        return adapted(x)
    if meta["adapter_type"] == "mh_adapter":
        return F.linear(adapted(x), weight, base_bias)
    return adapted(F.linear(x, weight, base_bias))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_golden_file_keeps_its_outputs_in_the_normal_form(path: Path) -> None:
    meta, tensors = load(path)
    y = output(meta, tensors)
    assert (y - tensors["y"]).abs().max() <= 1e-10 * tensors["y"].abs().max()


def test_there_are_as_many_golden_files_as_there_were() -> None:
    assert len(FILES) == 21


@pytest.mark.parametrize(
    ("stem", "train", "expected"),
    [
        pytest.param("tt_768to64_r5", "tt", ([8, 8, 12], [8, 8], [5, 5, 5, 5]), id="on-a-bond-stays-as-it-is"),
        pytest.param(
            "tt_64to4096_r5_straddle", "tt", ([16, 4], [4, 16, 4, 4, 4], [5, 20, 5, 5, 5, 5]), id="one-core-is-split"
        ),
        pytest.param(
            "tt_64to5120_r5_unaligned", "tt", ([8, 8], [5, 16, 8, 8], [8, 25, 5, 5, 5]), id="only-the-right-fits"
        ),
        pytest.param(
            "tt_1280to64_r5_unaligned", "tt", ([4, 8, 8, 5], [8, 8], [5, 5, 5, 25, 8]), id="only-the-left-fits"
        ),
        pytest.param("tt_tiny4to6_24_order1", "tt", ([4], [6], [4]), id="a-single-core"),
    ],
)
def test_the_shape_of_the_normal_form(stem: str, train: str, expected) -> None:
    path = next(path for path in FILES if path.stem == stem)
    meta, tensors = load(path)
    cores = cores_of(tensors, train)
    result, shape = normal_form(cores, meta[train]["in_features"], meta[train]["out_features"])
    assert shape == TTShape(*expected)
    kept = sum(any(core is other for other in cores) for core in result)
    untouched = {"tt_768to64_r5": 5, "tt_64to4096_r5_straddle": 5, "tt_64to5120_r5_unaligned": 3}
    assert kept == untouched.get(stem, kept)


def test_splitting_is_the_same_matrix_and_balances_the_cores() -> None:
    matrix = torch.randn(24, 30, dtype=torch.float64)
    cores = tt_svd(matrix, (4, 6), (5, 6))
    shape = TTShape((4, 6), (5, 6), [core.shape[2] for core in cores[:-1]])
    torch.testing.assert_close(reference.tt_matrix(TT(flat(cores, torch.float64), shape)), matrix)
    assert shape.ranks == (4, 24, 6)
    norms = [core.norm() for core in cores]
    assert all(torch.isclose(a, b) for a, b in pairwise(norms))


def test_a_capped_train_is_nearly_the_best_of_its_ranks() -> None:
    left, right = torch.randn(64, 3, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64)
    matrix = left @ right + 1e-3 * torch.randn(64, 48, dtype=torch.float64)
    cores = tt_svd(matrix, (64,), (48,), max_rank=3)
    error = (cores[0][0] @ cores[1][:, :, 0] - matrix).norm()
    best = torch.linalg.svdvals(matrix)[3:].norm()
    torch.testing.assert_close(error, best)


def test_a_zero_matrix_is_a_train_that_ends_in_a_zero_core() -> None:
    cores = tt_svd(torch.zeros(6, 4), (2, 3), (4,), max_rank=2)
    assert [core.any().item() for core in cores] == [True, True, False]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4, 2), (3, 6, 1)], "no tensor train"),
        ([(1, 4, 2)], "no tensor train"),
        ([], "no tensor train"),
        ([(4, 6)], "no tensor train"),
        ([(1, 4, 2), (2, 5, 1)], "20 entries is no matrix of 6 x 4"),
    ],
)
def test_cores_that_are_no_such_train_are_refused(shapes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normal_form([torch.zeros(shape) for shape in shapes], 6, 4)
