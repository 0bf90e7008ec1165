"""Perplexity of a language model and accuracy of a classifier on encoded examples."""

import math
import sys
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from loretta.cli.distributed import processes, share, summed
from loretta.cli.encode import IGNORED, Collator, Examples
from loretta.cli.models import device as used_device
from loretta.cli.report import is_main

METRICS = {"causal_lm": "perplexity", "seq_cls": "accuracy"}


@torch.no_grad()
def evaluate(
    model: Any, examples: Examples, collator: Collator, batch_size: int, task: str, title: str
) -> dict[str, float]:
    """The mean loss over all predicted tokens (or rows), and the task's metric; each process does a share of it.

    Returns:
        `loss` in nats, and `perplexity` = exp(loss) or `accuracy` in [0, 1].
    """
    model.eval()
    device = used_device()
    loss_sum, right, count = 0.0, 0.0, 0.0
    starts = range(0, len(examples.items), batch_size)
    mine = share(starts)
    rounds = range(math.ceil(len(starts) / processes()))  # a sharded model needs every process in every round
    for number in tqdm(rounds, desc=title, unit="batch", file=sys.stderr, leave=False, disable=not is_main()):
        start = mine[number] if number < len(mine) else 0
        batch = collator(examples.items[start : start + batch_size])
        labels = batch.pop("labels").to(device)
        logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
        if number >= len(mine):
            continue
        if task == "causal_lm":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        counted = labels != IGNORED
        logits, labels = logits[counted].float(), labels[counted]
        loss_sum += cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum()) if task == "seq_cls" else 0
        count += labels.numel()
    loss_sum, right, count = summed([loss_sum, right, count], device)
    loss = loss_sum / count
    if task == "causal_lm":
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return {"loss": loss, "accuracy": right / count}
