"""`loretta finetune`: train an adapter on a file, with evaluation before and after."""

import argparse
import json
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import DataCollatorWithFlattening, set_seed

from loretta.cli import distributed, models
from loretta.cli.checkpoints import fingerprint, start_or_resume
from loretta.cli.encode import encode, label_names, make_collator
from loretta.cli.eval import evaluate, main_metric
from loretta.cli.output import RECORD, OutputFolder, size_on_disk, write_json
from loretta.cli.report import UserError, is_main, log, need, print_result, score_texts, size_text, table
from loretta.cli.rows import Rows, read_rows
from loretta.cli.training import plot_losses, train, training_arguments

# Options that may differ between a run and the one that resumes it.
FREE = {"command", "output", "save_steps", "resume", "plot", "eval_steps", "report_to", "threads", "json"}


@dataclass(frozen=True)
class Job:
    """A run whose options and data are checked; nothing is loaded yet."""

    args: argparse.Namespace
    base: models.Base
    config: Any
    rows: Rows
    held_rows: Rows

    def settings(self) -> dict[str, Any]:
        """What --resume must find unchanged, as JSON keeps it."""
        args, base, config = self.args, self.base, self.config.to_dict()
        given = {name: value for name, value in vars(args).items() if name not in FREE and "method_" not in name}
        given |= {name: config[name] for name in config if name not in ("task_type", "peft_type", "peft_version")}
        given |= asdict(base) | {"columns": dict(args.columns)}
        given |= {"processes": PartialState().num_processes, "engine": distributed.engine()}
        for name in ("data", "eval_data"):
            given[name] = [fingerprint(source) for source in given[name] or []]
        return json.loads(json.dumps(given, default=sorted))


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked first, then train, then swap the result in.

    Of several processes all train, and only the first one writes and prints.
    """
    distributed.connect()
    with ExitStack() as stack:
        with distributed.agreed():
            output = OutputFolder(args.output)
            job = _checked(args)
            found: list[Any] = [None, {}]
            if is_main():
                stack.enter_context(output)
                found = list(start_or_resume(output, job.settings(), args.resume))
        checkpoint, record = broadcast_object_list(found)
        result = _train(job, output, checkpoint, record)
        if is_main():
            output.publish()
            print_result(result, _summary(result), args.json)
    distributed.disconnect()


def _checked(args: argparse.Namespace) -> Job:
    if args.plot:
        need("matplotlib", "--plot", "plot")  # an error before the training, not after it
    if args.packing and args.task != "causal_lm":
        raise UserError(f"--packing is for rows of a language model, not for --task {args.task}")
    models.check_method_options(args, [args.method])
    config = models.method_config(args, args.method, args.task)
    base = models.make_base(args.model, args.gguf, args.task, args.dtype, args.quant)
    rows = read_rows(args.data, args.task, dict(args.columns))
    if args.task == "seq_cls":
        base = replace(base, labels=label_names(rows))
    if args.eval_data:
        held_rows = read_rows(args.eval_data, args.task, dict(args.columns))
        if held_rows.kind != rows.kind:
            raise UserError(f"{held_rows.source}: has {held_rows.kind} rows where --data has {rows.kind} rows")
    else:
        rows, held_rows = rows.held_out(args.eval_fraction)
    return Job(args, base, config, rows, held_rows)


def _train(job: Job, output: OutputFolder, checkpoint: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """Everything from the loaded tokenizer to the filled `output.new`."""
    base, args = job.base, job.args
    metric = main_metric(base.labels)
    with distributed.agreed():
        tokenizer = models.load_tokenizer(base)
        seq_len = models.usable_seq_len(args.seq_len, base, tokenizer)
        with torch.device("meta"):  # an error if the method does not fit, before any weight is loaded
            models.wrapped(models.skeleton(models.load_config(base), base.task, base.model), job.config)
        arguments = training_arguments(args, output, base.dtype)  # DeepSpeed shards models made from here on
        examples = encode(job.rows, tokenizer, seq_len, base.labels)
        held_out = encode(job.held_rows, tokenizer, seq_len, base.labels)
    held_items = held_out.items[: args.eval_limit]
    collator = make_collator(tokenizer, base.labels)

    log(f"loading {base.model}")
    set_seed(args.seed)
    model = models.load_base(base, tokenizer)
    if distributed.engine() == "none":
        total = model.num_parameters()  # of a 4-bit weight numel() counts the bytes
    else:
        total = sum(map(distributed.numel, model.parameters()))
    log(f"{len(examples.items)} examples to train on, {len(held_items)} held out, at most {seq_len} tokens each")
    examples.log_omissions("training", seq_len)
    held_out.log_omissions("held out", seq_len)
    set_seed(args.seed)
    model = models.wrapped(model, job.config)
    trainable = sum(distributed.numel(parameter) for parameter in model.parameters() if parameter.requires_grad)

    def measure(title: str) -> dict[str, float]:
        return evaluate(model, held_items, collator, args.per_device_train_batch_size, base.labels, title)

    def on_start() -> None:
        if args.packing:
            models.check_packing(model)
        if "before" not in record:
            with models.base_only(model):
                record["before"] = measure("before")
            if is_main():
                write_json(output.run_file, record)
        log(f"before: {metric} {score_texts(record['before'])[metric]}")

    packed = DataCollatorWithFlattening() if args.packing else collator
    state, seconds = train(model, examples.items, packed, arguments, output, checkpoint, on_start, measure)
    before, after = record["before"], measure("after")
    if not math.isfinite(after["loss"]):
        if is_main():
            output.remove_checkpoints()
        raise UserError(f"the training diverged (held-out loss {after['loss']}); nothing was saved; lower --lr")

    weights = distributed.gathered(model)
    if not is_main():
        return {}
    model.save_pretrained(output.new, state_dict=weights)
    result = {
        "method": args.method,
        **asdict(base),
        "seq_len": seq_len,
        "batch_size": args.per_device_train_batch_size,
        "processes": PartialState().num_processes,
        "rows": {"training": examples.counts(), "held_out": held_out.counts()},
        "trainable_parameters": trainable,
        "base_parameters": total,
        "steps": state.global_step,
        "seconds": round(seconds, 1),
        "metric": metric,
        "before": before,
        "after": after,
        "adapter": str(output.path),
        "adapter_bytes": size_on_disk(output.new, "adapter_*"),
    }
    write_json(output.new / RECORD, result)
    if args.plot:
        unit = "nats a predicted token" if base.labels is None else "nats a row" if base.labels else "squared error"
        title = f"LoRETTA_{args.method} on {Path(base.model).name}, {Path(args.data[0]).name}"
        ends = {0: before["loss"], state.global_step: after["loss"]}
        plot_losses(output.new / "loss.png", state.log_history, ends, title, unit)
    return result


def _summary(result: dict[str, Any]) -> str:
    """The result for people."""
    share = 100 * result["trainable_parameters"] / result["base_parameters"]
    scores = [(name, when, text) for when in ("before", "after") for name, text in score_texts(result[when]).items()]
    return table(
        [
            ("method", result["method"]),
            ("trainable parameters", f"{result['trainable_parameters']:,} ({share:.3f} % of the base)"),
            *((f"{name} {when}", text) for name, when, text in scores),
            ("training", f"{result['steps']} steps in {result['seconds']:.0f} s"),
            ("adapter", f"{result['adapter']} ({size_text(result['adapter_bytes'])})"),
        ]
    )
