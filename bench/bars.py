"""The ratios that are promised on a CPU with one thread, each with its bar and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Row = tuple[str, str, str, str]
UPSTREAM_BARS = {"adp": {16: 5.0, 512: 4.0, 2048: 3.0}, "rep": {512: 2.0}}
KINDS = ("adp", "rep")


def bars(runs: Iterable[dict[str, Any]]) -> list[Row]:
    """What is promised, the bar, what was measured, and whether it holds; only of what was measured on a CPU."""
    runs = [run for run in runs if run["threads"] == 1 and run["cuda"] is None]
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["benchmark"], []).extend(run["records"])
    operators = [*_of_size(found.get("tt_adapter", [])), *_of_size(found.get("tt_lora", []))]
    return [
        *(row for record in operators for row in _operator(record)),
        *(row for record in found.get("training_step", []) for row in _training(record)),
        *(row for record in found.get("wrapping", []) for row in _wrapping(record)),
    ]


def _of_size(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those of d = 4096 and rank 5 in which ours is right."""
    return (r for r in records if (r["d"], r["rank"]) == (4096, 5) and "loretta" in r["peers"])


def _operator(record: dict[str, Any]) -> Iterator[Row]:
    """The promises of one operator at one number of rows."""
    kind, N, peers = record["kind"], record["N"], record["peers"]
    ours, where = peers["loretta"], f"{kind}, d = 4096, rank 5, N = {N}"
    if "upstream" in peers:
        upstream = peers["upstream"]
        if bar := UPSTREAM_BARS[kind].get(N):
            yield _at_least(f"{where}: upstream / ours", bar, upstream["both"] / ours["both"])
        if kind == "adp" and N >= 128:
            kept, x_alone = (size / upstream["saved_bytes"] for size in (ours["saved_bytes"], 4 * N * record["d"]))
            yield _at_most(f"{where}: bytes kept, ours / upstream", 0.65, kept, f" (x alone: {x_alone:.3g})")
    if "dense" in peers and N >= 128:
        yield _at_least(f"{where}: dense bottleneck / ours", 1.0, peers["dense"]["both"] / ours["both"])
    if "LoRA r=8" in peers and N == 512:
        spread = max(ours["spread"], peers["LoRA r=8"]["spread"])
        ratio = peers["LoRA r=8"]["both"] / ours["both"]
        yield _at_least(f"{where}: LoRA r = 8 / ours, within the spread", 1.0 - spread, ratio)


def _training(record: dict[str, Any]) -> Iterator[Row]:
    """The adapters' share of a step."""
    methods = record["methods"]
    for kind in KINDS:
        names: Sequence[str] = (f"loretta {kind}", f"upstream {kind}")
        if all(name in methods for name in names):
            ours, upstream = (methods[name] for name in names)
            where = f"{record['model']}, {record['tokens']} tokens, {kind}"
            what = f"{where}: share over the frozen base, ours / upstream's"
            shares = f"{ours['share']:.1%} / {upstream['share']:.1%}"
            first, second = sorted((ours, upstream), key=lambda method: method["share"])
            if first["share_high"] < second["share_low"] and first["share"] > 0:
                yield _at_most(what, 0.5, ours["share"] / upstream["share"], f" ({shares})")
            else:
                yield what, "at most 0.5", shares, "not resolved: the intervals overlap"


def _wrapping(record: dict[str, Any]) -> Iterator[Row]:
    """Time and allocations."""
    where = f"wrapping {record['model']}, {record['kind']}"
    if "seconds" in record:
        yield _at_most(f"{where}: seconds", 5.0, record["seconds"])
    elif f"upstream {record['kind']}" in record["methods"]:
        ours, upstream = (record["methods"][f"{name} {record['kind']}"]["both"] for name in ("loretta", "upstream"))
        yield _at_least(f"{where}: upstream / ours", 5.0, upstream / ours)
    yield _at_most(f"{where}: weights of d x d allocated", 0, record["dense_allocations"])


def _at_least(what: str, bar: float, value: float) -> Row:
    return what, f"at least {bar:.3g}", f"{value:.3g}", "holds" if value >= bar else "**misses**"


def _at_most(what: str, bar: float, value: float, detail: str = "") -> Row:
    return what, f"at most {bar:.3g}", f"{value:.3g}{detail}", "holds" if value <= bar else "**misses**"
