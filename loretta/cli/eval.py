"""`loretta eval`: perplexity or accuracy of a model, with or without an adapter."""

import argparse
import math
from pathlib import Path
from typing import Any

from loretta.cli import options
from loretta.cli.adapters import adapter_base, load_adapter, read_record
from loretta.cli.encode import Collator, encode
from loretta.cli.errors import UserError
from loretta.cli.metrics import METRICS, evaluate
from loretta.cli.models import DTYPES, load_base, load_tokenizer, make_base, usable_seq_len
from loretta.cli.report import show, shown_metric
from loretta.cli.rows import read_rows

EPILOG = f"""\
{options.DATA_FORMATS}
examples:
  loretta eval --adapter runs/book --data held-out.txt
  loretta eval --model runs/book-merged --data held-out.txt
  loretta eval --model HuggingFaceTB/SmolLM2-135M --data held-out.txt --seq-len 128 --json
"""


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "eval",
        help="perplexity or accuracy of a model or a saved adapter",
        description="Evaluate a base model, a merged model, a LoRETTA adapter, or an exported LoRA adapter.",
        epilog=EPILOG,
    )
    options.add_model_options(parser, dtypes=DTYPES, required=False)
    parser.add_argument("--adapter", metavar="DIR", help="folder of a LoRETTA or plain LoRA adapter")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", required=True, metavar="FILE_OR_ID", help=".txt, .jsonl, .csv or a hub data set; see below"
    )
    data.add_argument("--task", choices=options.TASKS, help="default: what the adapter or merged model was trained for")
    data.add_argument("--seq-len", type=options.at_least_two, metavar="N", help="default: as trained, else 256")
    data.add_argument("--batch-size", type=options.positive_int, metavar="N", help="default: as trained, else 8")
    data.add_argument("--eval-limit", type=options.positive_int, metavar="N", help="the first N blocks or rows only")
    options.add_run_options(parser)
    parser.set_defaults(run=run)


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
    rows = read_rows(args.data, base.task)
    tokenizer = load_tokenizer(base)
    seq_len = usable_seq_len(args.seq_len or record.get("seq_len"), base, tokenizer)
    model = load_base(base, tokenizer)
    labels = None
    if base.task == "seq_cls":
        labels = base.labels or [model.config.id2label[number] for number in range(model.config.num_labels)]
    if args.adapter:
        model = load_adapter(model, args.adapter)
    examples = encode(rows, tokenizer, seq_len, labels).first(args.eval_limit)
    batch_size = args.batch_size or record.get("batch_size") or 8
    metric = METRICS[base.task]
    scores = evaluate(model, examples, Collator(tokenizer.pad_token_id), batch_size, base.task, "evaluating")
    if not math.isfinite(scores["loss"]):
        raise UserError(
            f"{args.adapter or args.model}: the loss on {args.data} is {scores['loss']}, not a finite number"
        )
    result = {"model": base.model, "adapter": args.adapter, "task": base.task, "examples": len(examples), **scores}
    show(result, [(metric, shown_metric(metric, scores[metric])), ("examples", str(len(examples)))], args.json)
