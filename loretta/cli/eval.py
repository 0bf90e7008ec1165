"""`loretta eval`: loss and scores of a model on encoded examples, with or without an adapter."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy, mse_loss
from tqdm.auto import tqdm

from loretta.cli.adapters import adapter_base, load_with_adapter, read_record
from loretta.cli.encode import IGNORED, encode, make_collator
from loretta.cli.models import load_tokenizer, make_base, usable_seq_len
from loretta.cli.report import UserError, is_main, print_result, score_texts, table
from loretta.cli.rows import read_rows


def run(args: argparse.Namespace) -> None:
    """Load a model and the data, evaluate, print the result."""
    if not (args.adapter or args.model):
        raise UserError("give --model, --adapter, or both")
    record = read_record(Path(args.adapter or args.model).expanduser())
    if args.adapter:
        base = adapter_base(args.adapter, args)
        if args.task not in (None, base.task):
            raise UserError(f"{args.adapter}: was trained for {base.task}, not {args.task}")
    else:
        task = args.task or record.get("task") or "causal_lm"
        base = make_base(args.model, args.gguf, task, args.dtype or record.get("dtype"), args.quant)
    rows = read_rows(args.data, base.task, dict(args.columns))
    tokenizer = load_tokenizer(base)
    seq_len = usable_seq_len(args.seq_len or record.get("seq_len"), base, tokenizer)
    model = load_with_adapter(base, tokenizer, args.adapter)
    labels = base.labels
    if base.task == "seq_cls" and labels is None:
        count = model.config.num_labels
        labels = [model.config.id2label[number] for number in range(count)] if count > 1 else []
    examples = encode(rows, tokenizer, seq_len, labels)
    examples.log_omissions(rows.source, seq_len)
    items = examples.items[: args.eval_limit]
    collator = make_collator(tokenizer, labels)
    scores = evaluate(model, items, collator, args.batch_size or record.get("batch_size") or 8, labels, "evaluating")
    if not math.isfinite(scores["loss"]):
        name = args.adapter or args.model
        raise UserError(f"{name}: the loss on {rows.source} is {scores['loss']}, not a finite number")
    counts = examples.counts() | {"examples": len(items)}
    result = {"model": base.model, "adapter": args.adapter, "task": base.task, **counts, **scores}
    print_result(result, table([*score_texts(scores).items(), ("examples", str(len(items)))]), args.json)


def main_metric(labels: Sequence[str] | None) -> str:
    """The score that is named first: of a language model (None), a regression (no labels) or a classifier."""
    return "perplexity" if labels is None else "accuracy" if labels else "pearson"


@torch.no_grad()
def evaluate(
    model: Any,
    items: Sequence[dict[str, Any]],
    collator: Callable[..., Any],
    batch_size: int,
    labels: Sequence[str] | None,
    title: str,
) -> dict[str, float]:
    """The mean loss over all predicted tokens (or rows), and scores; each process evaluates a share of the batches.

    Args:
        items: as `encode` makes them.
        labels: the classes, none for a regression, None for a language model.

    Returns:
        `loss` (cross-entropy in nats, or the squared error), and `perplexity` = exp(loss), or what `scores` returns.
    """
    model.eval()
    is_regression = labels is not None and not labels
    done: dict[int, tuple[float, int, list[tuple[float, float]]]] = {}  # by the first item of a batch
    starts = list(range(0, len(items), batch_size))
    # Padded: a sharded model needs every process in every round.
    with PartialState().split_between_processes(starts, apply_padding=True) as share:
        for start in tqdm(share, desc=title, unit="batch", file=sys.stderr, leave=False, disable=not is_main()):
            batch = collator(items[start : start + batch_size])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            wanted = batch.pop("labels")
            logits = model(**batch).logits
            if labels is None:
                counted = wanted[:, 1:] != IGNORED
                logits, wanted = logits[:, :-1][counted], wanted[:, 1:][counted]
            logits, loss = (logits.squeeze(-1), mse_loss) if is_regression else (logits, cross_entropy)
            pairs = []
            if labels is not None:
                predictions = logits if is_regression else logits.argmax(-1)
                pairs = list(zip(predictions.tolist(), wanted.tolist(), strict=True))
            done[start] = loss(logits.float(), wanted, reduction="sum").item(), wanted.numel(), pairs
    losses, counts, rows = zip(*dict(gather_object(list(done.items()))).values(), strict=True)
    mean = sum(losses) / sum(counts)
    if labels is None:
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    found, wanted = np.array(list(chain(*rows))).T
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
    one_hot = np.eye(len(labels))
    a, b = one_hot[found.astype(int)], one_hot[wanted.astype(int)]
    f1 = 2 * (a * b).sum(0) / np.maximum((a + b).sum(0), 1)
    by_name = {f"f1_{name}": float(value) for name, value in zip(labels, f1, strict=True)} if len(labels) == 2 else {}
    accuracy = float((found == wanted).mean())
    return {"accuracy": accuracy, "f1": float(f1.mean()), **by_name, "matthews": _correlation(a, b)}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; of one-hot rows it is Matthews' (Gorodkin, 2004)."""
    a, b = a - a.mean(0), b - b.mean(0)
    spread = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum()) / spread if spread else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, equal ones sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
