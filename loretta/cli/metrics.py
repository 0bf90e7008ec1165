"""Loss and scores of a model on encoded examples."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy, mse_loss
from tqdm.auto import tqdm

from loretta.cli.encode import IGNORED, Collator
from loretta.cli.report import is_main


def main_metric(labels: Sequence[str] | None) -> str:
    """The score that is named first: of a language model (None), a regression (no labels) or a classifier."""
    return "perplexity" if labels is None else "accuracy" if labels else "pearson"


@torch.no_grad()
def evaluate(
    model: Any,
    items: Sequence[dict[str, Any]],
    collator: Collator,
    batch_size: int,
    labels: Sequence[str] | None,
    title: str,
) -> dict[str, float]:
    """The mean loss over all predicted tokens (or rows), and scores; each process does a share of it.

    Args:
        items: as `encode` makes them.
        labels: the classes, none for a regression, None for a language model.

    Returns:
        `loss` (cross-entropy in nats, or the squared error), and `perplexity` = exp(loss), or what `scores` returns.
    """
    model.eval()
    state = PartialState()
    starts = range(0, len(items), batch_size)
    mine = starts[state.process_index :: state.num_processes]
    rounds = range(math.ceil(len(starts) / state.num_processes))  # a sharded model needs every process in every round
    losses: list[tuple[float, int]] = []
    rows: list[tuple[float, float]] = []
    for number in tqdm(rounds, desc=title, unit="batch", file=sys.stderr, leave=False, disable=not is_main()):
        start = mine[number] if number < len(mine) else 0
        batch = {name: value.to(model.device) for name, value in collator(items[start : start + batch_size]).items()}
        wanted = batch.pop("labels")
        logits = model(**batch).logits
        if number >= len(mine):
            continue
        if labels is None:
            counted = wanted[:, 1:] != IGNORED
            logits, wanted = logits[:, :-1][counted], wanted[:, 1:][counted]
        is_regression = labels is not None and not labels
        logits, loss = (logits.squeeze(-1), mse_loss) if is_regression else (logits, cross_entropy)
        losses.append((loss(logits.float(), wanted, reduction="sum").item(), wanted.numel()))
        if labels is not None:
            answers = logits if is_regression else logits.argmax(-1)
            rows += zip(answers.tolist(), wanted.tolist(), strict=True)
    total, count = map(sum, zip(*gather_object(losses), strict=True))
    mean = total / count
    if labels is None:
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    found, wanted = np.array(gather_object(rows)).T
    return {"loss": mean} | scores(found, wanted, labels)


def scores(found: np.ndarray, wanted: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Scores of predictions; one that is not defined is 0.

    Args:
        found, wanted: numbers of classes, or the values of a regression.
        labels: the classes, none for a regression.

    Returns:
        For classes `accuracy`, `f1` (the mean over the classes, and where they are two of each, `f1_NAME`) and
        `matthews`, Matthews' correlation; for a regression `pearson` and `spearman`.
    """
    if not labels:
        return {"pearson": _correlation(found, wanted), "spearman": _correlation(_ranks(found), _ranks(wanted))}
    confusion = np.zeros((len(labels), len(labels)))
    np.add.at(confusion, (wanted.astype(int), found.astype(int)), 1)
    right, total = confusion.diagonal(), confusion.sum()
    rows, columns = confusion.sum(1), confusion.sum(0)
    f1 = 2 * right / np.maximum(rows + columns, 1)
    spread = math.sqrt((total**2 - columns @ columns) * (total**2 - rows @ rows))
    named = {f"f1_{name}": float(value) for name, value in zip(labels, f1, strict=True)} if len(labels) == 2 else {}
    matthews = float(right.sum() * total - rows @ columns) / spread if spread else 0.0
    return {"accuracy": float(right.sum() / total), "f1": float(f1.mean()), **named, "matthews": matthews}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / spread if spread else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, equal ones sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
