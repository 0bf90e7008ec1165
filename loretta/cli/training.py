"""Training on transformers' Trainer, with progress on stderr and nothing on stdout."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loretta.cli import distributed
from loretta.cli.checkpoints import seal
from loretta.cli.encode import Collator, Examples
from loretta.cli.report import is_main


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    lr: float
    steps: int | None
    epochs: float
    batch_size: int
    grad_accum: int
    weight_decay: float
    lr_schedule: str
    warmup: float
    seed: int
    save_steps: int | None
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Outcome:
    """What a training run leaves behind beside the trained parameters."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]]


def training_arguments(schedule: Schedule, checkpoints: Path, dtype: str) -> TrainingArguments:
    """The Trainer's arguments; to be made before the model, which transformers then loads as the engine needs it.

    Args:
        checkpoints: folder for the checkpoints that `schedule.save_steps` asks for.
        dtype: the base model's. FSDP and DeepSpeed must know of bfloat16, since they take no mixture of dtypes.
    """
    return TrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=schedule.lr,
        max_steps=schedule.steps or -1,
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.grad_accum,
        weight_decay=schedule.weight_decay,
        lr_scheduler_type=schedule.lr_schedule,
        warmup_steps=schedule.warmup,
        optim="adamw_torch",
        seed=schedule.seed,
        gradient_checkpointing=schedule.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if schedule.gradient_checkpointing else None,
        save_strategy="steps" if schedule.save_steps else "no",
        save_steps=schedule.save_steps or 1,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        use_cpu=distributed.on_cpu(),
        bf16=dtype == "bfloat16" and distributed.engine() != "none",
    )


def train(
    model: Any,
    examples: Examples,
    collator: Collator,
    arguments: TrainingArguments,
    resume_from: Path | None,
    on_start: Callable[[], None],
) -> Outcome:
    """Train the model in place, going on from a checkpoint where one is given.

    Args:
        on_start: called when the model is ready to be run as the engine wants it, before the first step.
    """
    trainer = Trainer(model=model, args=arguments, train_dataset=examples.items, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    clock = _Clock(on_start)
    trainer.add_callback(clock)
    trainer.add_callback(_Checkpoints())
    if is_main():
        trainer.add_callback(_Progress())
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    losses = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(trainer.state.global_step, clock.seconds, losses)


class _Clock(TrainerCallback):
    """What comes before the first step, and how long the steps take."""

    def __init__(self, on_start: Callable[[], None]):
        self.on_start = on_start
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_start()
        self.seconds = -time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter()


class _Checkpoints(TrainerCallback):
    """No checkpoint at the very end, and a seal on each that every process has written its part of."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # resumed from there, the Trainer would go one step too far

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        distributed.wait()
        if is_main():
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Progress(TrainerCallback):
    """A progress bar with the current loss."""

    bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
