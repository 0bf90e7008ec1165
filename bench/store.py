"""python -m bench.store: what a store of many adapters costs: to open, to look up, to load from, on disk.

The adapters are one trained adapter with noise on its numbers. Exit code 1 when a gate fails:

- the store opens in less than 100 ms, in a new process
- an adapter that is in no cache, neither the store's nor the system's, loads in less than 5 ms
- the folder has at most 1.2 times the bytes of the adapters' numbers
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.output import add_output_options, emit
from loretta import AdapterStore
from loretta.cli.output import size_on_disk
from loretta_kernels.selfcheck import text_table

GATES = {"open_ms": 100.0, "cold_ms": 5.0, "bytes_over_numbers": 1.2}
SAMPLES, PROCESSES = 50, 9
OPEN = """
import sys, time
from loretta.store import AdapterStore
start = time.perf_counter()
AdapterStore(sys.argv[1])
print((time.perf_counter() - start) * 1e3)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print; 1 where a gate fails."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder) / "store", args.adapter, args.adapters)
    if args.lora:
        found["lora_file_bytes"] = (args.lora / "adapter_model.safetensors").stat().st_size
    missed = [name for name, limit in GATES.items() if found[name] > limit]
    lines = [(name, f"{value:,.3f}" if isinstance(value, float) else value) for name, value in found.items()]
    text = text_table(("what", "value"), lines) + f"\n\nmissed: {', '.join(missed) or 'nothing'}"
    emit(args, "bench.store", argv, found | {"missed": missed}, text)
    return bool(missed)


def measure(folder: Path, adapter: Path, count: int) -> dict[str, Any]:
    """Make a store of so many adapters in the folder and measure it; times are medians, the worst beside the gated."""
    store = AdapterStore.create(folder, like=adapter)
    store.add({"trained": adapter})
    start = time.perf_counter()
    store.add_tensors(_noisy(store.load("trained"), count - 1))
    seconds = time.perf_counter() - start
    names = random.Random(0).sample(list(store), SAMPLES)

    opened = [_opened_in_a_new_process(folder) for _ in range(PROCESSES)]
    cold = [_cold(folder, name) for name in names]
    store = AdapterStore(folder)
    looked_up = [_timed(lambda name=name: name in store) for name in names]
    paged = [_timed(lambda name=name: store.load(name)) for name in names]
    places = store.places(SAMPLES)
    fetched, again = ([_timed(lambda name=name: places.fetch(name)) for name in names] for _ in range(2))
    stacked = [_timed(lambda: store.stack(names)) for _ in range(SAMPLES)]
    on_disk = size_on_disk(folder)
    return {
        "adapters": count,
        "numbers_each": store.nbytes // count // store.dtype.itemsize,
        "dtype": str(store.dtype).removeprefix("torch."),
        "add_ms_each": seconds / (count - 1) * 1e3,
        "open_ms": statistics.median(opened),
        "open_ms_worst": max(opened),
        "look_up_us": statistics.median(looked_up) * 1e3,
        "cold_ms": statistics.median(cold),
        "cold_ms_worst": max(cold),
        "in_page_cache_ms": statistics.median(paged),
        "to_its_place_ms": statistics.median(fetched),
        "in_its_place_us": statistics.median(again) * 1e3,
        f"stack_{SAMPLES}_ms": statistics.median(stacked),
        "bytes": on_disk,
        "bytes_over_numbers": on_disk / store.nbytes,
        "bytes_each": on_disk // count,
        "peft_file_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
    }


def _noisy(tensors: dict[str, Tensor], count: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        noise = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
        yield f"adapter-{number}", {key: tensor + 0.01 * noise[key].to(tensor) for key, tensor in tensors.items()}


def _timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _opened_in_a_new_process(folder: Path) -> float:
    """Milliseconds, without Python's start and the imports."""
    done = subprocess.run([sys.executable, "-c", OPEN, folder], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _cold(folder: Path, name: str) -> float:
    """Milliseconds that loading takes when no page of the rows is in memory."""
    store = AdapterStore(folder)
    (rows,) = folder.glob("rows-*.bin")
    with open(rows, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _timed(lambda: store.load(name))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench.store", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="a trained adapter without norms")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="a LoRA of the same model, whose file is compared")
    parser.add_argument("--adapters", type=int, default=10000, metavar="N", help="in the store (default 10000)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the store is made (default: the system's)")
    add_output_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
