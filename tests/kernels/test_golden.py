"""The golden vectors: outputs and every gradient, made by an independent implementation in fp64 from fp32 inputs."""

from __future__ import annotations

import json
from itertools import accumulate
from operator import mul
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import loretta_kernels
from loretta_kernels import TTShape, reference

from .problems import error

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
TRAINS = ("tt", "down", "up", "A", "B")
ACTIVATIONS = {"gelu_new": "gelu_tanh"}

# Their cut falls inside a core, or no prefix of the modes divides: these need the conversion that comes later.
OFF_BOND = {
    "adp_1024_b8_r4_tanh",
    "adp_4096_b64_r5_relu",
    "layer_adp_mh_adapter_relu_bias",
    "layer_adp_output_adapter_gelu_bias",
    "layer_rep_bias",
    "rep_4096to4096_r8_tt5",
    "rep_8192to1024_r8_tt5",
    "tt_1280to64_r5_unaligned",
    "tt_64to4096_r5_straddle",
    "tt_64to5120_r5_unaligned",
    "tt_tiny4to6_24_order1",
    "tt_tiny6to4_4x6_r3_straddle",
}


def shapes_of(meta: dict) -> dict[str, TTShape | None]:
    """Each train's shape, or None where the cut falls on no bond."""
    shapes: dict[str, TTShape | None] = {}
    for name in TRAINS:
        if name in meta:
            modes, ranks = meta[name]["shape"], meta[name]["ranks"]
            prefixes = list(accumulate(modes, mul))
            on_bond = meta[name]["in_features"] in prefixes[:-1]
            cut = prefixes.index(meta[name]["in_features"]) + 1 if on_bond else 0
            shapes[name] = TTShape(modes[:cut], modes[cut:], ranks[1:-1]) if on_bond else None
    return shapes


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """A file's description and its tensors."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    return meta, {name: torch.from_numpy(array) for name, array in arrays.items()}


ON_BOND = [path for path in FILES if None not in shapes_of(load(path)[0]).values()]


def flat(tensors: dict[str, Tensor], name: str, suffix: str = "") -> Tensor:
    """The cores of a train, or their gradients, as one flat tensor."""
    count = sum(key.startswith(f"{name}.core") and not key.endswith(".grad") for key in tensors)
    return torch.cat([tensors[f"{name}.core{k}{suffix}"].reshape(-1) for k in range(count)])


def run(functions, meta: dict, shapes: dict[str, TTShape], inputs: dict[str, Tensor]) -> Tensor:
    """y of a file's formula."""
    x = inputs["x"]
    if meta["kind"] == "tt_linear":
        return functions.tt_linear(x, inputs["tt"], shapes["tt"], inputs["tt.bias"])
    if meta["kind"] == "adapter":
        return functions.tt_adapter(
            x,
            inputs["down"],
            shapes["down"],
            inputs["down.bias"],
            inputs["up"],
            shapes["up"],
            inputs["up.bias"],
            activation=ACTIVATIONS.get(meta["act"], meta["act"]),
            scale=meta["scaling"],
            residual=x,
        )
    assert meta["kind"] == "rep"
    return functions.tt_lora(x, inputs["A"], shapes["A"], inputs["B"], shapes["B"], scale=meta["alpha"] / meta["r"])


def test_the_files_off_a_bond_are_those_listed():
    assert len(FILES) == 21
    assert {path.stem for path in FILES} - {path.stem for path in ON_BOND} == OFF_BOND


@pytest.mark.parametrize("path", ON_BOND, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("functions", "dtype", "bar"),
    [
        pytest.param(reference, torch.float64, 1e-12, id="reference-fp64"),
        pytest.param(loretta_kernels, torch.float64, 1e-12, id="operators-fp64"),
        pytest.param(loretta_kernels, torch.float32, 1e-5, id="operators-fp32"),
    ],
)
def test_reproduces_outputs_and_every_gradient(path, functions, dtype, bar):
    meta, tensors = load(path)
    shapes = shapes_of(meta)
    truth = {"x": tensors["dx"]}
    inputs = {"x": tensors["x"]}
    for name in shapes:
        inputs[name], truth[name] = flat(tensors, name), flat(tensors, name, ".grad")
        if meta[name]["bias"]:
            inputs[f"{name}.bias"], truth[f"{name}.bias"] = tensors[f"{name}.bias"], tensors[f"{name}.bias.grad"]
    inputs = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    y = run(functions, meta, shapes, inputs)
    y.backward(tensors["dy"].to(dtype))
    assert error(y.detach(), tensors["y"]) <= bar
    for name, tensor in inputs.items():
        assert error(tensor.grad, truth[name]) <= bar, name
