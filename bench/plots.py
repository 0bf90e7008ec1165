"""The report's plots: time, ratio and memory of an operator over N, and the parts of a training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "loretta": ("C0", "o-"),
    "loretta torch": ("C9", "D-"),
    "loretta compiled": ("C0", "o:"),
    "plain compiled": ("C4", "v-"),
    "upstream": ("C3", "s-"),
    "dense": ("C1", "^-"),
    "LoRA r=8": ("C2", "^-"),
    "LoRA r=16": ("C8", "v-"),
    "copy": ("0.35", "--"),
    "base linear": ("0.6", "-."),
}
LABELS = {"copy": "limit: a copy of the bytes", "base linear": "a frozen d x d linear", "dense": "dense layers"}
LIMITS = ("copy", "base linear")
Record = dict[str, Any]


def plot_operator(records: Sequence[Record], path: Path, title: str) -> None:
    """Three panels over N for the size that was measured at most N: time and its limits, ratios, bytes kept."""
    (d, rank), _ = Counter((record["d"], record["rank"]) for record in records).most_common(1)[0]
    chosen = sorted((r for r in records if (r["d"], r["rank"]) == (d, rank)), key=lambda record: record["N"])
    names = [name for name in STYLES if any(name in record["peers"] for record in chosen)]
    ours = "loretta"
    figure, (times, ratios, memory) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    figure.suptitle(f"{title}: d = {d}, rank {rank}, {chosen[0]['dtype']}, forward + backward")

    for name in names:
        _line(times, chosen, name, lambda peers, name: peers[name]["both"])
        if name != ours and name not in LIMITS:
            _line(ratios, [r for r in chosen if ours in r["peers"]], name, lambda p, n: p[n]["both"] / p[ours]["both"])
        if name not in LIMITS:
            _line(memory, chosen, name, lambda peers, name: peers[name]["saved_bytes"] / 2**10, per_row=True)
    ratios.axhline(1, color="C0", linewidth=1)
    for axis, what in (
        (times, "time [ms]"),
        (ratios, f"time over that of {ours}"),
        (memory, "kept for backward, per row [KiB]"),
    ):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([record["N"] for record in chosen], [str(record["N"]) for record in chosen])
        axis.set_xlabel("rows N")
        axis.set_ylabel(what)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize="small")
    ratios.set_yscale("linear")
    ratios.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _line(
    axis: Any, records: Sequence[Record], name: str, value: Callable[[dict, str], float], per_row: bool = False
) -> None:
    """One peer over N, where it was measured."""
    points = [
        (record["N"], value(record["peers"], name) / (record["N"] if per_row else 1))
        for record in records
        if name in record["peers"]
    ]
    color, style = STYLES[name]
    axis.plot(*zip(*points, strict=True), style, color=color, label=LABELS.get(name, name))


def plot_training(records: Sequence[Record], path: Path, title: str) -> None:
    """For each model its methods: forward, backward and optimiser stacked, and the peak of memory."""
    figure, axes = plt.subplots(len(records), 2, figsize=(13, 0.8 + 3.2 * len(records)), squeeze=False)
    figure.suptitle(title)
    for (times, memory), record in zip(axes, records, strict=True):
        names = list(record["methods"])[::-1]
        left = [0.0] * len(names)
        for part in ("forward", "backward", "optimiser"):
            values = [record["methods"][name][part] for name in names]
            times.barh(names, values, left=left, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
        times.axvline(record["methods"]["frozen base"]["step"], color="0.35", linewidth=1)
        times.set_xlim(right=1.3 * max(left))
        times.set_xlabel("time of a step [ms]")
        times.legend(fontsize="small", loc="upper right")
        memory.barh(names, [record["methods"][name]["peak_bytes"] / 2**20 for name in names], color="C4")
        memory.set_xlabel("peak memory beyond the weights [MiB]")
        times.set_title(f"{record['model']}, {record['tokens']} tokens, {record['dtype']}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
