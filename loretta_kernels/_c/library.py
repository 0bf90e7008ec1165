"""The C source, compiled by this machine's compiler for its processor when first used, and kept for other processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")
CACHE_VARIABLE = "LORETTA_CACHE"
SECONDS = 120  # for the compiler, which takes some 3


class Unavailable(Exception):
    """Why there is no library."""


def library() -> ctypes.CDLL:
    """The library. Raises Unavailable where it cannot be had."""
    found = _outcome()
    if isinstance(found, Unavailable):
        raise found
    return found


def why_not() -> str | None:
    """Why there is no library, or None when there is one."""
    found = _outcome()
    return str(found) if isinstance(found, Unavailable) else None


def folder() -> Path:
    """Where compiled libraries are kept: LORETTA_CACHE, or "loretta" in the user's folder for caches."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loretta"


@cache
def _outcome() -> ctypes.CDLL | Unavailable:
    """The library, or why there is none: looked for once in a process."""
    try:
        if not sys.platform.startswith("linux"):
            raise Unavailable(f"the C path is for Linux, this is {sys.platform}")
        found = ctypes.CDLL(str(_compiled([*_compiler(), *FLAGS])))
        found.loretta_forward.restype = found.loretta_backward.restype = ctypes.c_int64
        return found
    except Unavailable as reason:
        return reason
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Unavailable(f"{type(error).__name__}: {error}")


def _compiler() -> list[str]:
    """The command of the C compiler: CC, or the first of cc, gcc and clang that there is."""
    if chosen := os.environ.get("CC", "").split():
        return chosen
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise Unavailable("there is no C compiler: CC is not set, and none of cc, gcc and clang is installed")


def _compiled(command: list[str]) -> Path:
    """The library in the cache, compiled where it is not there."""
    path = folder() / f"adapter-{_key(command)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            new = Path(work) / path.name
            _run([*command, str(SOURCE / "adapter.c"), "-o", str(new), "-lm"])
            new.replace(path)  # at once: other processes may be doing the same
    return path


def _key(command: list[str]) -> str:
    """A name for what the library depends on: source, compiler and its flags, and the processor: homes are shared."""
    parts = [file.read_bytes() for file in sorted(SOURCE.glob("*.[ch]"))]
    parts += [" ".join(command).encode(), _run([command[0], "--version"]).encode()]
    processor = Path("/proc/cpuinfo").read_text().splitlines()
    parts += sorted(
        {line.encode() for line in processor if line.startswith(("model name", "flags", "Features", "CPU"))}
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _run(command: list[str]) -> str:
    """The command's output; RuntimeError with the end of its errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:].strip()}")
    return done.stdout
