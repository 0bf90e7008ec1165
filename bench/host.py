"""python -m bench.host: microseconds of the host from the Python call to the launch, by a driver that launches nothing.

Triton compiles the kernels for sm_90 as it would on a GPU; the stub takes the place of its CUDA driver, so that all of
a call's Python and C++ runs but the launch itself. Tensors lie in the CPU's memory and hold one short row, so that
PEFT's LoRA layer beside them, which does run, has next to nothing to compute. What CUDA's own calls cost is in none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoRA
from torch import nn

from bench.output import add_output_options, emit
from bench.report import table
from bench.timing import Rounds, Work
from loretta_kernels import _dispatch, backend
from loretta_kernels.nn import TTAdapter, TTLinear, TTLoRA

FEATURES = 96
CALLS = 20  # a round
BARS = {"forward": 40.0, "both": 150.0}  # microseconds


class _Launcher:
    """What a compiled kernel is started by: here, by nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Driver:
    """As much of Triton's driver as compiling for sm_90 and a launch ask for."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=lambda *args: (object(), 0, 128, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def stub_driver() -> Iterator[None]:
    """Serve tensors on the CPU by the kernels, and launch nothing."""
    from triton.runtime import driver

    why_not = _dispatch.why_not_triton
    driver.set_active(_Driver())  # for the rest of the process: without a GPU there is none to go back to
    _dispatch.why_not_triton = lambda call: None
    try:
        with backend("triton"):
            yield
    finally:
        _dispatch.why_not_triton = why_not


def works() -> dict[str, Work]:
    """The layers by name, each called on a row, then backward for it and the parameters."""
    x = torch.randn(1, FEATURES, requires_grad=True)
    adapter, linear = TTAdapter(FEATURES), TTLinear(FEATURES, FEATURES)
    update = TTLoRA(nn.Identity(), in_features=FEATURES, out_features=FEATURES)
    dense = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
    lora = LoRA(dense, "default", config=LoraConfig(r=8), r=8, lora_alpha=16)
    layers = {
        "tt_adapter": adapter,
        "tt_lora": update,
        "tt_linear": linear,
        "PEFT's LoRA": lora,
        "frozen linear": dense,
    }

    def work(layer: nn.Module) -> Work:
        def backward(outputs: list[torch.Tensor]) -> None:
            for y in outputs:
                y.backward(dy)
                layer.zero_grad()

        return Work(lambda: [layer(x) for _ in range(CALLS)], backward)

    dy = torch.ones(1, FEATURES)
    return {name: work(layer) for name, layer in layers.items()}


def measured(seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of a call by layer: forward, and forward and backward."""
    torch.set_num_threads(1)
    with stub_driver():
        rounds = Rounds(works(), torch.device("cpu"))
        for _ in range(rounds.needed(seconds)):
            rounds()
    return {
        name: {key: round(1000 * value[key] / CALLS, 1) for key in BARS} for name, value in rounds.summary().items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the microseconds; 1 where one of ours is above its bar."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure (default: %(default)s)")
    add_output_options(parser)
    args = parser.parse_args(argv)
    found = measured(args.seconds)
    above = [
        f"{name}: {key} {found[name][key]} us, at most {bar}"
        for name in found
        for key, bar in BARS.items()
        if name.startswith("tt_") and found[name][key] > bar
    ]
    lines = [(name, *(f"{micros[key]:.1f}" for key in BARS)) for name, micros in found.items()]
    text = table(("microseconds of a call", "forward", "forward + backward"), lines)
    emit(args, "bench.host", argv, {"microseconds": found, "above": above}, "\n".join([text, "", *above]).rstrip())
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
