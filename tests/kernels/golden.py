"""The golden vectors: outputs and every gradient, made by an independent implementation in fp64 from fp32 inputs."""

from __future__ import annotations

import json
from itertools import accumulate
from operator import mul
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loretta_kernels import TT, TTShape
from loretta_kernels.selfcheck import error

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
TRAINS = ("tt", "down", "up", "A", "B")
ACTIVATIONS = {"gelu_new": "gelu_tanh"}


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
    x, trains = inputs["x"], [TT(inputs[name], shapes[name], inputs.get(f"{name}.bias")) for name in shapes]
    if meta["kind"] == "tt_linear":
        return functions.tt_linear(x, *trains)
    if meta["kind"] == "adapter":
        activation = ACTIVATIONS.get(meta["act"], meta["act"])
        return functions.tt_adapter(x, *trains, activation=activation, scale=meta["scaling"], residual=x)
    assert meta["kind"] == "rep"
    return functions.tt_lora(x, *trains, scale=meta["alpha"] / meta["r"])


def errors(functions, path: Path, dtype: torch.dtype) -> dict[str, float]:
    """The relative errors of the output and of every gradient of a file, computed in a dtype."""
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
    grads = {f"d{name}": error(tensor.grad, truth[name]) for name, tensor in inputs.items()}
    return {"y": error(y.detach(), tensors["y"])} | grads
