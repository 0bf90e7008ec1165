"""The options of the benchmarks, their cells, and one JSON file of results for each file of benchmarks."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import upstream
from bench.grid import cells

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft")
SECONDS = {"quick": 0.7, "full": 2.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=("cpu", "cuda"), default=default, help="default: the GPU where there is one")
    group.addoption("--grid", choices=tuple(SECONDS), default="quick", help="which sizes; default: quick")
    group.addoption("--sizes", type=int, nargs="+", metavar="d", help="only these hidden sizes of the grid")
    group.addoption("--results", type=Path, default=RESULTS, help="folder of the results; default: bench/results")
    group.addoption("--part", default="", help="ends the names of the result files, where several runs make up a grid")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = {}
    if config.getoption("--device") == "cpu":
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        options = metafunc.config.getoption
        chosen = cells(metafunc.module.KIND, options("--grid"), options("--device"))
        sizes = options("--sizes")
        chosen = [cell for cell in chosen if sizes is None or cell.d in sizes]
        metafunc.parametrize("cell", chosen, ids=lambda cell: cell.name.replace(" ", "-").replace("=", ""))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device that is measured."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def seconds(pytestconfig: pytest.Config) -> float:
    """How long the rounds of one cell take."""
    return SECONDS[pytestconfig.getoption("--grid")]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Adds a record to the results of this file of benchmarks, and writes them: what is cut short keeps what it has."""
    stem = request.path.stem.removeprefix("bench_")
    records = request.config.stash[_RECORDS].setdefault(stem, [])

    def add(found: dict[str, Any]) -> None:
        records.append(found)
        _write(request.config, stem, records)

    return add


def _write(config: pytest.Config, stem: str, records: list[dict[str, Any]]) -> None:
    """One file of results."""
    device, part = config.getoption("--device"), config.getoption("--part")
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    run = {
        "benchmark": stem,
        "grid": config.getoption("--grid"),
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES} | {"upstream": upstream.version()},
        "cuda": torch.version.cuda if device == "cuda" else None,
        "records": records,
    }
    folder = config.getoption("--results") / ("cpu" if device == "cpu" else name.lower().replace(" ", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}{'-' + part if part else ''}.json"
    path.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")


def _version(package: str) -> str | None:
    """What is installed."""
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


_RECORDS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
