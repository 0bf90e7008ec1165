"""Faults put into PTX: name, pattern and replacement."""

from __future__ import annotations

import re
from collections.abc import Callable


def _later(found: re.Match[str]) -> str:
    return f"{found.group(1)}{int(found.group(2)) + 1};"


MUTATIONS: dict[str, tuple[str, str | Callable[[re.Match[str]], str]]] = {
    "no barrier": (r"bar\.sync\s+0;", ""),
    "relaxed in place of acq_rel": (r"acq_rel", "relaxed"),
    "a load without its mask": (r"@!?%p\d+ (ld\.global)", r"\1"),
    "a store without its mask": (r"@!?%p\d+ (st\.global)", r"\1"),
    "no wait for cp.async": (r"cp\.async\.wait_group\s+\d+;", ""),
    "a wait for cp.async one group late": (r"(cp\.async\.wait_group\s+)(\d+);", _later),
    "no commit of cp.async": (r"cp\.async\.commit_group;", ""),
    "no wait for wgmma": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "a wait for wgmma one group late": (r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+);", _later),
    "no commit of wgmma": (r"wgmma\.commit_group\.sync\.aligned;", ""),
    "no wgmma.fence": (r"wgmma\.fence\.sync\.aligned;", ""),
    "no proxy fence": (r"fence\.proxy\.async(::|\.)?[\w:]*;", ""),
}


class Mutated:
    """A function from PTX to PTX with a fault in it; `places`: how many it was put into."""

    def __init__(self, name: str) -> None:
        self.pattern, self.new = MUTATIONS[name]
        self.places = 0

    def __call__(self, ptx: str) -> str:
        changed, places = re.subn(self.pattern, self.new, ptx)
        self.places += places
        return changed
