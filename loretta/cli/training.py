"""Training on transformers' Trainer, with progress on stderr and nothing on stdout, and a plot of its losses."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from loretta.cli.checkpoints import seal
from loretta.cli.distributed import engine, on_cpu
from loretta.cli.output import OutputFolder
from loretta.cli.report import UserError, is_main, refusing

SMOOTHING = 0.9  # of the running mean in the plot


def training_arguments(args: argparse.Namespace, output: OutputFolder, dtype: str) -> TrainingArguments:
    """The Trainer's arguments; to be made before the model, which transformers then loads as the engine needs it.

    Args:
        args: of `loretta finetune`; those that have the name of a field are passed on.
        dtype: the base model's. FSDP and DeepSpeed must know of bfloat16, since they take no mixture of dtypes, and
            float16 needs scaled gradients.
    """
    if dtype == "float16" and on_cpu():
        raise UserError("--dtype float16 trains on accelerators only; on a CPU take float32 or bfloat16")
    with refusing("transformers refuses an option", ImportError, RuntimeError, ValueError):
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # its error names a missing package
        fixed = {
            "output_dir": str(output.checkpoints),
            "max_steps": args.steps or -1,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if args.gradient_checkpointing else None,
            "save_strategy": "steps" if args.save_steps else "no",
            "save_steps": args.save_steps or 1,
            "save_total_limit": 2,
            "eval_strategy": "steps" if args.eval_steps else "no",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "report_to": args.report_to or "none",
            "remove_unused_columns": False,
            "dataloader_pin_memory": not on_cpu(),
            "label_names": ["labels"],
            "use_cpu": on_cpu(),
            "bf16": dtype == "bfloat16" and engine() != "none",
            "fp16": dtype == "float16",
        }
        names = {field.name for field in fields(TrainingArguments)}
        return TrainingArguments(**{name: value for name, value in vars(args).items() if name in names} | fixed)


def train(
    model: Any,
    items: list[dict[str, Any]],
    collator: Callable[..., Any],
    arguments: TrainingArguments,
    output: OutputFolder,
    resume_from: Path | None,
    on_start: Callable[[], None],
    measure: Callable[[str], dict[str, float]],
) -> tuple[TrainerState, float]:
    """Train the model in place, from a checkpoint if one is given.

    Args:
        on_start: called before the first step, when the engine has prepared the model.
        measure: evaluates the model, under a title.

    Returns:
        the Trainer's state, with the losses by step in its `log_history`, and the seconds that the steps took.
    """
    progress = Progress(on_start)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=items,
        eval_dataset=items,  # required for --eval-steps and not used: `measure` has its own
        data_collator=collator,
        callbacks=[progress],
    )
    trainer.measure = measure
    with refusing(f"--optim {arguments.optim}", ImportError, ValueError):
        trainer.get_optimizer_cls_and_kwargs(arguments, model)
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output.logs)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    return trainer.state, progress.seconds


class _Trainer(Trainer):
    """Evaluates as `loretta eval` does: the mean over all tokens, whatever the batches."""

    measure: Callable[[str], dict[str, float]]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        scores = self.measure(f"step {self.state.global_step}")
        if is_main():
            tqdm.write(f"step {self.state.global_step}: held-out loss {scores['loss']:.4f}", file=sys.stderr)
        logged = {f"eval_{name}": value for name, value in scores.items()}
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged


class Progress(TrainerCallback):
    """Calls `on_start`, measures the time of the steps, shows their progress, and seals every checkpoint."""

    def __init__(self, on_start: Callable[[], None]):
        self.on_start = on_start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_start()
        options = {"total": state.max_steps, "initial": state.global_step, "desc": "training", "unit": "step"}
        self.bar = tqdm(**options, file=sys.stderr, disable=not is_main())
        self.seconds = -time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()
        if state.global_step >= state.max_steps:
            control.should_save = False  # resumed from there, the Trainer would make one step too many

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if is_main():
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter()
        self.bar.close()


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
