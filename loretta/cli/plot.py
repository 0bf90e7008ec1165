"""The loss curve of a run, as a picture."""

from pathlib import Path

from loretta.cli.errors import UserError

SMOOTHING = 0.9


def need_matplotlib() -> None:
    """Say before the training, not after it, that no curve can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--plot needs the package matplotlib: pip install 'loretta-tt[plot]'") from error


def plot_losses(file: Path, losses: list[tuple[int, float]], held_out: dict[int, float], title: str, unit: str) -> None:
    """Draw the training loss by step, its running mean, and the held-out loss where it was measured.

    Args:
        losses: pairs of (step, loss in nats).
        held_out: loss by step.
        unit: what one loss is the mean over.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [step for step, _ in losses]
    axes.plot(
        steps, [loss for _, loss in losses], color="tab:blue", alpha=0.35, linewidth=1, label="training, each step"
    )
    axes.plot(steps, _running_mean(losses), color="tab:blue", linewidth=2, label="training, running mean")
    axes.plot(list(held_out), list(held_out.values()), "o--", color="tab:orange", label="held out, before and after")
    axes.set(xlabel="optimiser step", ylabel=f"loss (nats per {unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def _running_mean(losses: list[tuple[int, float]]) -> list[float]:
    """The exponential running mean, corrected for its start."""
    mean, means = 0.0, []
    for count, (_, loss) in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**count))
    return means
