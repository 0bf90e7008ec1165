"""Ways to break what a user hands over, each with a name: the same ones in every run."""

from __future__ import annotations

import json
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "loretta.json"
VALUES = (None, -1, 0, 7, 10**6, 10**18, 0.5, 1e308, True, "", "x", "../..", [], ["x", 1], {}, {"x": [None]})
Break = Callable[[Path], None]


def damaged_bytes(data: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Truncations, flipped bits, inserted and repeated parts, and what is no file of the kind at all."""
    draw = random.Random(seed)
    for _ in range(count):
        at = draw.randrange(len(data))
        yield f"cut at {at}", data[:at]
        flipped = bytearray(data)
        flipped[at] ^= 1 << draw.randrange(8)
        yield f"a bit of byte {at} flipped", bytes(flipped)
        yield f"rubbish at {at}", data[:at] + draw.randbytes(draw.randrange(1, 40)) + data[at:]
    yield "empty", b""
    yield "no UTF-8", b"\xff\xfe" + data
    yield "a list", b"[1, 2]"
    yield "deep", b"[" * 100_000
    yield "a number", b"7"


def replace_file(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)  # type: ignore[func-returns-value]


def json_cases(folder: Path, name: str, seed: int, values: int) -> Iterator[tuple[str, Break]]:
    """Every key of a JSON file with values of other kinds, without it, and a key nobody knows."""
    content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    draw = random.Random(seed)
    for key in sorted(content):
        for value in draw.sample(VALUES, values):
            yield f"{key}={value!r}", replace_file(name, json.dumps(content | {key: value}).encode())
        yield f"no {key}", replace_file(name, json.dumps({k: v for k, v in content.items() if k != key}).encode())
    yield "unknown key", replace_file(name, json.dumps(content | {"no_such_option": 1}).encode())
    yield (
        "NaN",
        replace_file(name, json.dumps(content | {"lora_alpha": float("nan"), "scaling": float("nan")}).encode()),
    )


def tensor_cases(folder: Path, seed: int, count: int) -> Iterator[tuple[str, Break]]:
    """Tensors of another shape, dtype or name, not finite, absent, or one too many."""
    tensors = load_file(folder / WEIGHTS)
    draw = random.Random(seed)

    def writing(changed: dict[str, torch.Tensor]) -> Break:
        return lambda target: save_file(changed, target / WEIGHTS)

    for _ in range(count):
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        others = {key: value for key, value in tensors.items() if key != name}
        yield f"{name} longer", writing(others | {name: torch.cat([tensor, tensor])})
        yield f"{name} empty", writing(others | {name: tensor[:0].clone()})
        yield f"{name} a scalar", writing(others | {name: torch.tensor(1.0)})
        dtype = draw.choice([torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16, torch.float8_e4m3fn])
        yield f"{name} as {dtype}", writing(others | {name: tensor.to(dtype)})
        value = draw.choice([float("nan"), float("inf")])
        yield f"{name} {value}", writing(others | {name: torch.full_like(tensor, value)})
        yield f"{name} absent", writing(others)
        yield f"{name} renamed", writing(others | {name + ".x": tensor})
        yield f"{name} beside another", writing(tensors | {"stranger": tensor.clone()})
    yield "no tensor", writing({})


class Hostile:
    """Pickled, it runs code on loading: it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def hostile_pickle(mark: Path) -> Break:
    """The adapter as a pickle that makes the file `mark` when it is loaded carelessly."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Hostile(mark)))

    return write


def instead_of_file(name: str) -> Break:
    """A folder where a file should be."""

    def write(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return write


def without_file(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def complaint(loretta: Callable[..., Any], *arguments: object) -> tuple[str | None, str]:
    """What is wrong with how a command ended, or None: it works, or exits with 2 and one line; and its stdout."""
    try:
        ran = loretta(*arguments)
    except Exception as error:
        return f"traceback: {error!r}"[:300], ""
    last = ran.err.splitlines()[-1] if ran.err else ""
    if ran.code == 0 or (ran.code == 2 and re.match(rf"loretta {arguments[0]}: error: .", last) and not ran.out):
        return None, ran.out
    return f"exit code {ran.code}: {last[:300]!r}", ran.out
