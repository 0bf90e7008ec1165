"""`loretta eval`: perplexity, or the scores of a classifier or a regression, with or without an adapter."""

import argparse
import math
from pathlib import Path

from loretta.cli.adapters import adapter_base, load_adapter, read_record
from loretta.cli.encode import Collator, encode
from loretta.cli.errors import UserError
from loretta.cli.metrics import evaluate
from loretta.cli.models import load_base, load_tokenizer, make_base, usable_seq_len
from loretta.cli.report import show, shown_scores
from loretta.cli.rows import read_rows


def run(args: argparse.Namespace) -> None:
    """Load what is named, evaluate it, print the result."""
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
    model = load_base(base, tokenizer)
    labels = base.labels
    if base.task == "seq_cls" and labels is None:
        count = model.config.num_labels
        labels = [model.config.id2label[number] for number in range(count)] if count > 1 else []
    if args.adapter:
        model = load_adapter(model, args.adapter)
    examples = encode(rows, tokenizer, seq_len, labels)
    examples.say_losses(rows.source, seq_len)
    batch_size = args.batch_size or record.get("batch_size") or 8
    items = examples.items[: args.eval_limit]
    scores = evaluate(model, items, Collator(tokenizer), batch_size, labels, "evaluating")
    if not math.isfinite(scores["loss"]):
        raise UserError(
            f"{args.adapter or args.model}: the loss on {rows.source} is {scores['loss']}, not a finite number"
        )
    counts = examples.counts() | {"examples": len(items)}
    result = {"model": base.model, "adapter": args.adapter, "task": base.task, **counts, **scores}
    show(result, [*shown_scores(scores).items(), ("examples", str(len(items)))], args.json)
