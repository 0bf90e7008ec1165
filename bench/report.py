"""python -m bench.report: bench/results/REPORT.md and its plots, only from the JSON files in its folders.

A ratio is a peer's median time over ours, both of the same interleaved rounds; above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.bars import bars
from bench.plots import plot_operator, plot_training

RESULTS = Path(__file__).parent / "results"
OPERATORS = {"tt_adapter": "LoRETTA_adp", "tt_lora": "LoRETTA_rep, the delta alone", "tt_linear": "a tensorised layer"}
OURS = "loretta"
PREDICTED = Path("predicted") / "bf16-sm_90.json"
MIB = 2**20
Run = dict[str, Any]


def read(folder: Path) -> list[Run]:
    """The runs of one device; what the instruments wrote beside them is not timed, and not reported here."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return [run for run in found if "benchmark" in run]


def device_section(folder: Path, runs: Sequence[Run]) -> str:
    """Everything that was measured on one device."""
    parts = [f"## {runs[0]['device']}", _conditions(runs)]
    if found := bars(runs):
        parts += ["### The bars", table(("what", "bar", "measured", ""), found)]
    for benchmark, title in OPERATORS.items():
        records = records_of(runs, benchmark)
        if records:
            plot_operator(records, folder / f"{benchmark}.png", f"{benchmark}, {runs[0]['device']}")
            parts += [f"### {benchmark}: {title}", f"![{benchmark}]({folder.name}/{benchmark}.png)", _operator(records)]
    if grouped := records_of(runs, "grouped"):
        parts += ["### Rows that use different adapters", _grouped(grouped)]
    if training := records_of(runs, "training_step"):
        plot_training(training, folder / "training_step.png", f"training step, {runs[0]['device']}")
        parts += ["### A training step", f"![training step]({folder.name}/training_step.png)"]
        parts += [_training(record) for record in training]
    if wrapping := records_of(runs, "wrapping"):
        parts += ["### Wrapping a model", _wrapping(wrapping)]
    return "\n\n".join(parts)


def records_of(runs: Iterable[Run], benchmark: str) -> list[dict[str, Any]]:
    """All records of one benchmark, the parts of its grid one after the other."""
    return [record for run in runs if run["benchmark"] == benchmark for record in run["records"]]


def _conditions(runs: Sequence[Run]) -> str:
    """On what, with what, and how steady the clock was."""
    drifts = [abs(record["drift"]) for run in runs for record in run["records"] if record.get("drift") is not None]
    found = {name: version for run in runs for name, version in run["versions"].items() if version}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    steady = ""
    if drifts:
        drifts.sort()
        steady = (
            f" The same version timed twice in the same rounds differs by {drifts[len(drifts) // 2]:.1%} in the median "
            f"and {drifts[-1]:.1%} at most."
        )
    threads = f"{runs[0]['threads']} thread{'s' if runs[0]['threads'] > 1 else ''}"
    return f"{threads}, Python {runs[0]['python']}, {versions}.{steady}"


def _operator(records: Sequence[dict[str, Any]]) -> str:
    """A line for each size."""
    peers = list(dict.fromkeys(name for record in records for name in record["peers"]))
    others = [name for name in peers if name not in (OURS, "copy", "base linear")]
    header = ["d", "rank", "N", "forward ms", "backward ms", "both ms", "spread", "times a copy", "of the base linear"]
    header += [f"{name} / ours" for name in others] + ["kept MiB", "upstream's", "peak MiB", "upstream's", "drift"]
    rows = []
    for record in sorted(records, key=lambda record: (record["d"], record["rank"], record["N"])):
        found = record["peers"]
        ours = found.get(OURS)
        if ours is None:
            rows.append([record["d"], record["rank"], record["N"], f"ours is wrong by {record['red'][OURS]:.1e}"])
            continue
        row = [record["d"], record["rank"], record["N"]]
        row += [f"{ours[key]:.3g}" for key in ("forward", "backward", "both")] + [f"{ours['spread']:.0%}"]
        row += [f"{ours['both'] / found['copy']['both']:.2f}", f"{ours['both'] / found['base linear']['both']:.1%}"]
        row += [_ratio(record, name, ours) for name in others]
        for key in ("saved_bytes", "peak_bytes"):
            row += [f"{ours[key] / MIB:.3g}", _mebibytes(found.get("upstream"), key)]
        rows.append([*row, f"{record['drift']:+.1%}"])
    return table(header, rows) + _reasons(records)


def _ratio(record: dict[str, Any], name: str, ours: dict[str, float]) -> str:
    """A peer's time over ours, or why there is none."""
    if name in record["red"]:
        return "wrong"
    return f"{record['peers'][name]['both'] / ours['both']:.2f}" if name in record["peers"] else "-"


def _mebibytes(found: dict[str, float] | None, key: str) -> str:
    return "-" if found is None else f"{found[key] / MIB:.3g}"


def _reasons(records: Iterable[dict[str, Any]]) -> str:
    """Who is missing and why, and who is wrong."""
    missing = {f"{name}: {why}" for record in records for name, why in record.get("unavailable", {}).items()}
    wrong = {
        f"{name}: off by {error:.1e} from the definition, not timed"
        for record in records
        for name, error in record.get("red", {}).items()
    }
    return "".join(f"\n\nNot measured: {'; '.join(sorted(reasons))}." for reasons in (missing | wrong,) if reasons)


def _grouped(records: Sequence[dict[str, Any]]) -> str:
    """A line for each layer and number of adapters."""
    others = list(dict.fromkeys(name for record in records for name in record["peers"] if name != OURS))
    header = ["mode", "kind", "d", "rows", "adapters", "forward ms", "backward ms", "spread"]
    rows = []
    for record in records:
        found = record["peers"]
        ours = found[OURS]
        row = [record[key] for key in ("mode", "kind", "d", "rows", "adapters")]
        row += [f"{ours['forward']:.3g}", f"{ours['backward']:.3g}", f"{ours['spread']:.0%}"]
        row += [f"{found[name]['both'] / ours['both']:.2f}" if name in found else "-" for name in others]
        rows.append([*row, f"{record['drift']:+.1%}"])
    text = (
        "One layer without its frozen product, from adapters that PEFT holds; `loop` is what unlike adapters get, "
        "`stacked` the same from stacked tensors, `one for all` one adapter for all rows. Serving is forward alone, "
        "training has the gradients of x and of every adapter."
    )
    return f"{text}\n\n{table([*header, *(f'{name} / ours' for name in others), 'drift'], rows)}"


def _training(record: dict[str, Any]) -> str:
    """A line for each method."""
    rows = [
        [
            name,
            f"{found['trainable']:,}",
            *(f"{found[key]:.4g}" for key in ("forward", "backward", "optimiser", "step")),
            f"{found['spread']:.1%}",
            f"{found['tokens_per_second']:.4g}",
            f"{found['peak_bytes'] / MIB:.4g}",
            f"{found['whole_share']:+.1%}",
            f"{found['share']:+.2%}",
            f"{found['share_low']:+.2%} to {found['share_high']:+.2%}",
        ]
        for name, found in record["methods"].items()
    ]
    header = ["method", "trainable", "forward ms", "backward ms", "optimiser ms", "step ms", "spread", "tokens/s"]
    title = f"{record['model']}, {record['tokens']} tokens, {record['dtype']}; the frozen base twice: "
    title += f"{record['drift']:+.1%}. The share is what a method adds to the frozen base's step, over it, the median "
    title += "of the rounds: by whole steps; and, on a CPU, by its adapters' and the optimiser's own time, measured "
    title += "within the step, with its interval at 95%."
    header += ["peak MiB", "share by steps", "share", "its interval"]
    return f"{title}\n\n{table(header, rows)}{_reasons([record])}"


def _wrapping(records: Sequence[dict[str, Any]]) -> str:
    """A line for each model and method."""
    rows = []
    for record in records:
        if "seconds" in record:
            rows.append([record["model"], record["kind"], f"{1000 * record['seconds']:.3g}", "-", "-"])
            rows[-1].append(record["dense_allocations"])
            continue
        for name, found in record["methods"].items():
            dense = record["dense_allocations"] if name.startswith("loretta") else "-"
            row = [record["model"], name, f"{found['both']:.4g}", f"{found['spread']:.0%}"]
            rows.append([*row, f"{found['peak_bytes'] / MIB:.4g}", dense])
    header = ("model", "method", "ms", "spread", "peak MiB", "weights of d x d allocated")
    return table(header, rows) + _reasons(records)


def predicted(predictions: Iterable[dict[str, Any]]) -> str:
    """A line for each direction of each class: microseconds, and the floor, by rows."""
    lines: dict[tuple[str, str], list[str]] = {}
    rows: dict[int, None] = {}
    for each in predictions:
        rows[each["rows"]] = None
        cell = f"{each['low']:.3g} to {each['high']:.3g} ({each['floor']:.2g})"
        lines.setdefault((each["case"], each["direction"]), []).append(cell)
    return table(("class", "direction", *(f"{N} rows" for N in rows)), [(*key, *cells) for key, cells in lines.items()])


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; 1 where there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: bench/results")
    results = parser.parse_args(argv).results
    sections = [device_section(folder, runs) for folder in sorted(results.glob("*/")) if (runs := read(folder))]
    if not sections:
        print(f"no results under {results}: make bench", file=sys.stderr)
        return 1
    if (path := results / PREDICTED).exists():
        sections += ["## An H100, predicted by a model and not measured", PREDICTION]
        sections.append(predicted(json.loads(path.read_text())["predictions"]))
    text = "\n\n".join(["# Benchmarks", f"Made by `python -m bench.report`; {HOW}", *sections])
    (results / "REPORT.md").write_text(text + "\n")
    print(results / "REPORT.md")
    return 0


HOW = (
    "[bench/README.md](../README.md) says how it was measured. Times are medians over interleaved rounds; a ratio is a "
    "peer's forward and backward over ours, above 1 ours is faster. Every peer's output and gradients were checked "
    "first. `kept` is what stays for backward, x included and parameters not."
)

PREDICTION = (
    "Microseconds of forward and backward in bf16, from the compiled kernels' cycles and bytes (`python -m "
    "bench.predict --help` says how); in brackets the time that the compulsory bytes take. No GPU has run them."
)

if __name__ == "__main__":
    sys.exit(main())
