"""The loss curve of a run, as a picture."""

from pathlib import Path
from typing import Any

SMOOTHING = 0.9


def plot_losses(file: Path, history: list[dict[str, Any]], ends: dict[int, float], title: str, unit: str) -> None:
    """Draw the training loss by step, its running mean, and the held-out loss where it was measured.

    Args:
        history: the Trainer's log.
        ends: the held-out losses before and after, by step.
        unit: what one loss is the mean over.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    held_out = ends | {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    mean, means = 0.0, []
    for count, loss in enumerate(losses.values(), 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**count))  # corrected for its start at 0
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(list(losses), list(losses.values()), color="tab:blue", alpha=0.35, linewidth=1, label="training")
    axes.plot(list(losses), means, color="tab:blue", linewidth=2, label="training, running mean")
    axes.plot(*zip(*sorted(held_out.items()), strict=True), "o--", color="tab:orange", label="held out")
    axes.set(xlabel="optimiser step", ylabel=f"loss ({unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
