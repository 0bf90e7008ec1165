"""`loretta eval`: perplexity or accuracy of a model, with or without an adapter."""

import argparse
import math
from pathlib import Path

from loretta.cli.adapters import adapter_base, load_adapter, read_record
from loretta.cli.encode import Collator, encode
from loretta.cli.errors import UserError
from loretta.cli.metrics import METRICS, evaluate
from loretta.cli.models import load_base, load_tokenizer, make_base, usable_seq_len
from loretta.cli.report import show, shown_metric
from loretta.cli.rows import read_rows


def run(args: argparse.Namespace) -> None:
    """Load what is named, evaluate it, print the result."""
    if args.adapter:
        record, base = read_record(Path(args.adapter)), adapter_base(args.adapter, args)
        if args.task not in (None, base.task):
            raise UserError(f"{args.adapter}: was trained for {base.task}, not {args.task}")
    elif args.model:
        record = read_record(Path(args.model))
        task = args.task or record.get("task") or "causal_lm"
        base = make_base(args.model, args.gguf, task, args.dtype or record.get("dtype"), args.quant)
    else:
        raise UserError("give --model, --adapter, or both")
    rows = read_rows(args.data, base.task, dict(args.columns))
    tokenizer = load_tokenizer(base)
    seq_len = usable_seq_len(args.seq_len or record.get("seq_len"), base, tokenizer)
    model = load_base(base, tokenizer)
    labels = None
    if base.task == "seq_cls":
        labels = base.labels or [model.config.id2label[number] for number in range(model.config.num_labels)]
    if args.adapter:
        model = load_adapter(model, args.adapter)
    examples = encode(rows, tokenizer, seq_len, labels).first(args.eval_limit)
    examples.say_losses(rows.source, seq_len)
    batch_size = args.batch_size or record.get("batch_size") or 8
    metric = METRICS[base.task]
    scores = evaluate(model, examples, Collator(tokenizer), batch_size, base.task, "evaluating")
    if not math.isfinite(scores["loss"]):
        raise UserError(
            f"{args.adapter or args.model}: the loss on {rows.source} is {scores['loss']}, not a finite number"
        )
    result = {
        "model": base.model,
        "adapter": args.adapter,
        "task": base.task,
        "examples": len(examples.items),
        **scores,
    }
    show(result, [(metric, shown_metric(metric, scores[metric])), ("examples", str(len(examples.items)))], args.json)
