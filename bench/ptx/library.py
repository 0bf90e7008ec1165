"""The executor's C++, compiled by g++ when first used and kept for other processes, and its structures for ctypes."""

from __future__ import annotations

import ctypes as ct
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "runtime"
FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-std=c++20")
MOST_FINDINGS = 200
PHASE_FIELDS = ("instructions", "cycles", "cycles_reordered", "trips", "trips_reordered", "unused")


def _structure(name: str, *fields: tuple[type, str]) -> type[ct.Structure]:
    """A structure of C with fields in groups of a type."""
    return type(
        name, (ct.Structure,), {"_fields_": [(field, kind) for kind, names in fields for field in names.split()]}
    )


Ins = _structure("Ins", (ct.c_int32, "kind plain guard negated first results operands k0 k1 k2 k3 k4 phase latency"))
Program = _structure(
    "Program",
    (ct.c_void_p, "code"),
    (ct.c_int32, "length"),
    (ct.c_void_p, "operands constants"),
    (ct.c_int32, "registers special warps shared phases pad"),
)
Buffer = _structure(
    "Buffer",
    (ct.c_uint64, "base"),
    (ct.c_void_p, "host"),
    (ct.c_uint64, "size"),
    (ct.c_int32, "element floating written pad"),
)
Config = _structure(
    "Config", (ct.c_uint64, "seed limit"), (ct.c_int32, "adversarial checks timing in_flight dram_sectors pad")
)
Finding = _structure("Finding", (ct.c_int32, "what pc other program warp lane"), (ct.c_uint64, "address count"))


def cache_folder() -> Path:
    """Where what is compiled is kept: LORETTA_CACHE, or "loretta" in the user's folder for caches."""
    chosen = os.environ.get("LORETTA_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loretta"


@cache
def library() -> ct.CDLL:
    """The executor. Raises RuntimeError where g++ is not there, or fails."""
    found = ct.CDLL(str(_compiled()))
    for name in ("kind_name", "finding_name", "plain_name", "plain_widths"):
        getattr(found, name).restype = ct.c_char_p
    sizes = (ct.c_int * 5)()
    found.sizes(sizes)
    assert list(sizes) == [ct.sizeof(of) for of in (Ins, Program, Buffer, Config, Finding)], list(sizes)
    return found


def _compiled() -> Path:
    """The library in the cache, compiled where it is not there."""
    files = sorted(SOURCE.iterdir())
    key = hashlib.sha256(b"\0".join([*(file.read_bytes() for file in files), *map(str.encode, FLAGS), _processor()]))
    path = cache_folder() / f"ptx-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        new = Path(work) / path.name
        try:
            subprocess.run(
                ["g++", *FLAGS, str(SOURCE / "runtime.cpp"), "-o", str(new)], check=True, capture_output=True
            )
        except FileNotFoundError:
            raise RuntimeError("the executor of PTX is compiled by g++, which is not installed") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"g++ cannot compile {SOURCE}: {error.stderr.decode()[-2000:]}") from None
        new.replace(path)  # at once: other processes may be doing the same
    return path


def _processor() -> bytes:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return next((line for line in lines if line.startswith(b"flags")), b"")


@cache
def kinds() -> dict[str, int]:
    """The numbers of the kinds of instructions."""
    return {name: index for index, name in enumerate(_names(library().kind_name))}


@cache
def findings() -> tuple[str, ...]:
    """What can be found, by number."""
    return tuple(_names(library().finding_name))


@cache
def plain() -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """By opcode, the number of each instruction from registers to registers and the widths of its operands."""
    found: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for index in range(library().plain_count()):
        widths = tuple(map(int, library().plain_widths(index).split()))
        found.setdefault(library().plain_name(index).decode(), []).append((index, widths))
    return found


def _names(function: object) -> list[str]:
    names: list[str] = []
    while (name := function(len(names))) is not None:  # type: ignore[operator]
        names.append(name.decode())
    return names
