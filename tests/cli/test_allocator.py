"""The C allocator keeps what tensors free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from loretta.cli import allocator, models

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")

PAGES = """
import resource, runpy, sys, torch
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
print(keep_freed_memory() if sys.argv[2] == "keep" else None)
for count in range(32):
    if count == 16:  # how soon the heap has grown to what this takes is chance
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = torch.ones(1 << 24)  # 64 MiB
    z = y * 2
    del y, z
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


def pages(mode: str, **environment: str) -> tuple[str, int]:
    """What keep_freed_memory returned in a new process, and how many pages the system then filled with zeros."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PAGES, allocator.__file__, mode]
    out = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True).stdout.split()
    return out[0], int(out[1])


def test_freed_blocks_are_used_again():
    kept, faults = pages("keep")
    assert kept == "True"
    assert faults < pages("leave")[1] / 10


@pytest.mark.parametrize("largest", [1 << 30, 1 << 25], ids=["glibc", "an older glibc"])
def test_neither_large_blocks_nor_the_end_of_the_heap_are_given_back(monkeypatch, largest):
    settings = {}

    def mallopt(name: int, value: int) -> int:
        if value > largest:
            return 0
        settings[name] = value
        return 1

    for name in allocator.CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert allocator.keep_freed_memory()
    assert settings == {allocator.M_MMAP_THRESHOLD: largest, allocator.M_TRIM_THRESHOLD: -1}


def test_settings_of_the_environment_stay():
    assert pages("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_a_base_on_a_cpu_is_loaded_into_a_process_that_keeps_memory(llama, tokenizer, monkeypatch):
    called = []
    monkeypatch.setattr(models, "keep_freed_memory", lambda: called.append(True))
    models.load_base(models.make_base(str(llama), None, "causal_lm", "float32"), tokenizer)
    assert called or models.device().type != "cpu"
