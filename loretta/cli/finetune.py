"""`loretta finetune`: train an adapter on a file, with evaluation before and after."""

import argparse
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from loretta.cli import distributed
from loretta.cli.checkpoints import fingerprint, start_or_resume
from loretta.cli.encode import Collator, encode, label_names
from loretta.cli.errors import UserError
from loretta.cli.method import check_method_options, method_config, method_settings
from loretta.cli.metrics import METRICS, evaluate
from loretta.cli.models import Base, load_base, load_config, load_tokenizer, make_base, usable_seq_len
from loretta.cli.output import RECORD, OutputFolder, size_on_disk, write_json
from loretta.cli.plot import need_matplotlib, plot_losses
from loretta.cli.report import is_main, say, show, shown_bytes, shown_metric
from loretta.cli.rows import Rows, read_rows
from loretta.cli.training import Outcome, Schedule, train, training_arguments
from loretta.cli.wrapping import base_only, skeleton, wrapped


@dataclass(frozen=True)
class Job:
    """A run with everything that is checked before anything is loaded."""

    base: Base
    config: Any
    schedule: Schedule
    rows: Rows
    held_rows: Rows
    args: argparse.Namespace

    def settings(self) -> dict[str, Any]:
        """What --resume must find unchanged."""
        args, schedule = self.args, asdict(self.schedule)
        del schedule["save_steps"]
        held_out = (
            {"eval_data": [fingerprint(source) for source in args.eval_data]}
            if args.eval_data
            else {"eval_fraction": args.eval_fraction}
        )
        model = {"model": self.base.model, "gguf": self.base.gguf, "task": self.base.task, "dtype": self.base.dtype}
        model["quant"] = self.base.quant
        data = {
            "data": [fingerprint(source) for source in args.data],
            "eval_limit": args.eval_limit,
            "seq_len": args.seq_len,
        }
        run = {"processes": distributed.processes(), "engine": distributed.engine()}
        return (
            model
            | data
            | held_out
            | schedule
            | run
            | {"method": args.method}
            | method_settings(self.config, args.method)
        )


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked first, then train, then swap the result in.

    Of several processes all train, and the first one alone writes and speaks.
    """
    distributed.connect()
    with ExitStack() as stack:
        with distributed.agreed():
            job = _checked(args)
            output = OutputFolder(args.output)
            checkpoint: Path | None = None
            record: dict[str, Any] = {}
            if is_main():
                stack.enter_context(output)
                checkpoint, record = start_or_resume(output, job.settings(), args.resume)
        checkpoint, record = distributed.of_main((checkpoint, record))
        result = _train(job, output, checkpoint, record)
        if is_main():
            output.publish()
            _show(result, args.json)
    distributed.disconnect()


def _checked(args: argparse.Namespace) -> Job:
    if args.plot:
        need_matplotlib()
    check_method_options(args, [args.method])
    config = method_config(args, args.method, args.task)
    base = make_base(args.model, args.gguf, args.task, args.dtype, args.quant)
    rows = read_rows(args.data, args.task, dict(args.columns))
    if args.task == "seq_cls":
        base = base.with_labels(label_names(rows))
    if args.eval_data:
        held_rows = read_rows(args.eval_data, args.task, dict(args.columns))
        if held_rows.kind != rows.kind:
            raise UserError(f"{held_rows.source}: has {held_rows.kind} rows where --data has {rows.kind} rows")
    else:
        rows, held_rows = rows.held_out(args.eval_fraction)
    schedule = Schedule(
        args.lr, args.steps, args.epochs, args.batch_size, args.grad_accum, args.weight_decay, args.lr_schedule,
        args.warmup, args.seed, args.save_steps or None, args.gradient_checkpointing,
    )  # fmt: skip
    return Job(base, config, schedule, rows, held_rows, args)


def _train(job: Job, output: OutputFolder, checkpoint: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """Everything from the loaded tokenizer to the filled `output.new`."""
    base, args = job.base, job.args
    metric = METRICS[base.task]
    with distributed.agreed():
        tokenizer = load_tokenizer(base)
        seq_len = usable_seq_len(args.seq_len, base, tokenizer)
        with torch.device("meta"):  # whether the method fits shows before any weight is loaded
            wrapped(skeleton(load_config(base), base.task, base.model), job.config)
        examples = encode(job.rows, tokenizer, seq_len, base.labels)
        held_out = encode(job.held_rows, tokenizer, seq_len, base.labels).first(args.eval_limit)
    collator = Collator(tokenizer)
    arguments = training_arguments(job.schedule, output.checkpoints, base.dtype)

    say(f"loading {base.model}")
    set_seed(args.seed)
    model = load_base(base, tokenizer)
    if distributed.engine() == "none":
        total = model.num_parameters()  # of a 4-bit weight numel() counts the bytes
    else:
        total = sum(distributed.count(parameter) for parameter in model.parameters())
    say(f"{len(examples.items)} examples to train on, {len(held_out.items)} held out, at most {seq_len} tokens each")
    examples.say_losses("training", seq_len)
    held_out.say_losses("held out", seq_len)
    set_seed(args.seed)
    model = wrapped(model, job.config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(distributed.count(parameter) for parameter in trained)

    def measure(title: str) -> dict[str, float]:
        return evaluate(model, held_out, collator, args.batch_size, base.task, title)

    def on_start() -> None:
        if "before" not in record:
            with base_only(model):
                record["before"] = measure("before")
            if is_main():
                write_json(output.run_file, record)
        say(f"before: {metric} {shown_metric(metric, record['before'][metric])}")

    outcome = train(model, examples, collator, arguments, checkpoint, on_start)
    before, after = record["before"], measure("after")
    if not math.isfinite(after["loss"]):
        if is_main():
            output.drop_checkpoints()
        raise UserError(f"the training diverged (held-out loss {after['loss']}); nothing was saved; lower --lr")

    weights = distributed.gathered(model)
    if not is_main():
        return {}
    model.save_pretrained(output.new, state_dict=weights)
    result = {
        "method": args.method,
        "model": base.model,
        "gguf": base.gguf,
        "task": base.task,
        "dtype": base.dtype,
        "quant": base.quant,
        "labels": base.labels,
        "seq_len": seq_len,
        "batch_size": args.batch_size,
        "processes": distributed.processes(),
        "rows": {"training": examples.counts(), "held_out": held_out.counts()},
        "trainable_parameters": trainable,
        "base_parameters": total,
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 1),
        "metric": metric,
        "before": before,
        "after": after,
        "adapter": str(output.path),
        "adapter_bytes": size_on_disk(output.new, "adapter_*"),
    }
    write_json(output.new / RECORD, result)
    if args.plot:
        _plot(output.new / "loss.png", job, outcome, before["loss"], after["loss"])
    return result


def _plot(file: Path, job: Job, outcome: Outcome, before: float, after: float) -> None:
    unit = "predicted token" if job.base.task == "causal_lm" else "row"
    title = f"LoRETTA_{job.args.method} on {Path(job.base.model).name}, {Path(job.args.data[0]).name}"
    plot_losses(file, outcome.losses, {0: before, outcome.steps: after}, title, unit)


def _show(result: dict[str, Any], as_json: bool) -> None:
    metric = result["metric"]
    share = 100 * result["trainable_parameters"] / result["base_parameters"]
    lines = [
        ("method", result["method"]),
        ("trainable parameters", f"{result['trainable_parameters']:,} ({share:.3f} % of the base)"),
        (f"{metric} before", shown_metric(metric, result["before"][metric])),
        (f"{metric} after", shown_metric(metric, result["after"][metric])),
        ("training", f"{result['steps']} steps in {result['seconds']:.0f} s"),
        ("adapter", f"{result['adapter']} ({shown_bytes(result['adapter_bytes'])})"),
    ]
    show(result, lines, as_json)
