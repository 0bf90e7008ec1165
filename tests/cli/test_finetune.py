"""The main job on tiny models: it learns, what it saves reloads the same, and an interrupted run ends the same."""

import json
import math
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from loretta.cli.checkpoints import newest_complete
from loretta.cli.training import Progress

LM = ["--seq-len", 32, "--batch-size", 4, "--steps", 12, "--lr", 0.01, "--threads", 1]
SMALL = {"adp": ["--bottleneck", 8], "rep": ["--dropout", 0.1, "--alpha", 32]}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def killed_after(monkeypatch):
    """Let a training die after so many steps."""

    def arrange(steps: int) -> None:
        def die(self, args, state, control, **kwargs) -> None:
            if state.global_step == steps:
                raise Killed

        monkeypatch.setattr(Progress, "on_step_end", die)

    return arrange


@pytest.fixture(params=["adp", "rep"])
def command(request, llama, book, tmp_path) -> list:
    method = request.param
    base = ["finetune", "--model", llama, "--data", book, "--method", method]
    return [*base, *SMALL[method], *LM, "--output", tmp_path / "out"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_learns_and_every_form_of_the_result_reloads_the_same(loretta, command, book, tmp_path) -> None:
    ran = loretta(*command, "--plot", "--json")
    assert ran.code == 0, ran.err
    result = ran.result()
    assert result["after"]["perplexity"] < 0.9 * result["before"]["perplexity"]
    assert result["steps"] == 12
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert result["adapter_bytes"] > (tmp_path / "out" / "adapter_model.safetensors").stat().st_size

    held_out = tmp_path / "held-out.txt"
    text = book.read_text()
    held_out.write_text(text[text.index(" ", int(len(text) * 0.95)) :])
    evaluation = ["--data", held_out, "--json"]
    again = loretta("eval", "--adapter", tmp_path / "out", *evaluation).result()
    assert again["loss"] == result["after"]["loss"]

    folders = {"merge": "--model", "export": "--adapter"}
    for verb, option in folders.items():
        ran = loretta(verb, "--adapter", tmp_path / "out", "--output", tmp_path / verb)
        if result["method"] == "adp":
            assert ran.code == 2
            assert "an adp adapter cannot be" in ran.err
            assert not (tmp_path / verb).exists()
        else:
            assert ran.code == 0, ran.err
            loss = loretta("eval", option, tmp_path / verb, *evaluation).result()["loss"]
            assert math.isclose(loss, result["after"]["loss"], rel_tol=1e-5)
    if result["method"] == "rep":
        assert json.loads((tmp_path / "export" / "adapter_config.json").read_text())["peft_type"] == "LORA"
        AutoModelForCausalLM.from_pretrained(tmp_path / "merge")
        ran = loretta("merge", "--adapter", tmp_path / "out", "--output", tmp_path / "out")
        assert "is the adapter itself" in ran.err


def test_a_resumed_run_ends_with_the_same_bits(loretta, command, tmp_path, killed_after, monkeypatch) -> None:
    command += ["--save-steps", 4]
    assert loretta(*command).code == 0
    whole = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    with monkeypatch.context():
        killed_after(10)
        with pytest.raises(Killed):
            loretta(*command)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    checkpoints = tmp_path / "out.part" / "checkpoints"
    assert newest_complete(checkpoints) == checkpoints / "checkpoint-8"

    ran = loretta(*command)
    assert ran.code == 2
    assert "holds an unfinished run (checkpoint-8); continue it with --resume" in ran.err
    ran = loretta(*command, "--resume", "--lr", 0.5)
    assert ran.code == 2
    assert "learning_rate was 0.01 and is 0.5" in ran.err

    (checkpoints / "checkpoint-8" / "trainer_state.json").unlink()  # killed while it was written
    ran = loretta(*command, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.result()["steps"] == 12
    assert "| 4/12 " in ran.err
    assert "| 0/12 " not in ran.err
    resumed = weights(tmp_path / "out")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    ran = loretta(*command, "--resume")
    assert ran.code == 2
    assert "nothing to resume: the run there is finished" in ran.err


def test_a_run_that_dies_keeps_the_former_adapter(loretta, command, tmp_path, killed_after) -> None:
    command += ["--save-steps", 0]
    assert loretta(*command).code == 0
    before = weights(tmp_path / "out")
    killed_after(3)
    with pytest.raises(Killed):
        loretta(*command, "--seed", 7)
    after = weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("method", ["adp", "rep"])
def test_a_classifier_learns_and_keeps_its_labels(loretta, roberta, reviews, tmp_path, method) -> None:
    command = ["--model", roberta, "--task", "seq_cls", "--data", reviews, "--method", method, "--eval-fraction", 0.2]
    out = tmp_path / "out"
    ran = loretta("finetune", *command, "--epochs", 4, "--batch-size", 8, "--output", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.result()["after"]["accuracy"] > 0.9
    again = loretta("eval", "--adapter", out, "--data", reviews, "--json").result()
    assert again["accuracy"] > 0.9
    if method == "rep":
        assert loretta("merge", "--adapter", out, "--output", tmp_path / "merged").code == 0
        merged = loretta("eval", "--model", tmp_path / "merged", "--data", reviews, "--json").result()
        assert math.isclose(merged["loss"], again["loss"], rel_tol=1e-4)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert model.config.id2label == {0: "bad", 1: "good"}


def test_a_class_with_one_row_does_not_stop_a_run(loretta, roberta, tmp_path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"{c * 3} {n},{c}\n" for c in "ab" for n in range(6)) + "ccc,c\n")
    command = ["--model", roberta, "--task", "seq_cls", "--data", data, "--method", "rep", "--eval-fraction", 0.9]
    ran = loretta("finetune", *command, "--steps", 1, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "loretta.json").read_text())["labels"] == ["a", "b", "c"]


def test_the_result_counts_the_rows_that_are_cut_or_dropped(loretta, llama, tmp_path) -> None:
    rows = [{"prompt": "p" * size, "completion": "answer"} for size in (1, 6, 20)] * 4
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", llama, "--data", tmp_path / "ask.jsonl", "--method", "rep", "--eval-fraction", 0.5]
    ran = loretta("finetune", *command, "--steps", 1, "--seq-len", 8, "--output", tmp_path / "out", "--json")
    counts = ran.result()["rows"]
    for name in ("cut", "dropped"):
        assert counts["training"][name] + counts["held_out"][name] == 4
    assert "rows have nothing to learn within 8 tokens and are left out" in ran.err


def test_pairs_are_compared_and_a_number_is_regressed(loretta, roberta, tmp_path) -> None:
    rng = random.Random(0)
    words = [(rng.choice("ab") * 3, rng.choice("ab") * 3) for _ in range(80)]
    data, out = tmp_path / "pairs.csv", tmp_path / "out"
    rows = [f"{one},{other},{4.5 if one == other == 'aaa' else 0.5 if one == other else 2}" for one, other in words]
    data.write_text("sentence1,sentence2,score\n" + "\n".join(rows) + "\n")
    columns = ["--columns", "text=sentence1", "text_pair=sentence2", "label=score"]
    command = ["--model", roberta, "--task", "seq_cls", "--data", data, *columns, "--method", "rep"]
    held_out = ["--eval-fraction", 0.2, "--plot"]
    ran = loretta("finetune", *command, "--epochs", 20, *held_out, "--output", out, "--json")
    assert ran.code == 0, ran.err
    result = ran.result()
    assert (result["labels"], result["metric"]) == ([], "pearson")
    assert result["after"]["loss"] < 0.5 * result["before"]["loss"]
    assert result["after"]["pearson"] > 0.8
    evaluation = ["--data", data, *columns, "--json"]
    again = loretta("eval", "--adapter", out, *evaluation).result()
    assert again["spearman"] > 0.8
    assert loretta("merge", "--adapter", out, "--output", tmp_path / "merged").code == 0
    merged = loretta("eval", "--model", tmp_path / "merged", *evaluation).result()
    assert math.isclose(merged["loss"], again["loss"], rel_tol=1e-4)


def test_packed_rows_do_not_see_each_other(loretta, llama, tokenizer, tmp_path) -> None:
    """The steps of packed rows are those of padded ones."""
    data = tmp_path / "ask.jsonl"
    data.write_text("".join(json.dumps({"prompt": "p" * n, "completion": "answer"}) + "\n" for n in range(1, 25)))
    command = ["finetune", "--model", llama, "--data", data, "--method", "rep", "--dropout", 0, "--steps", 3]
    found = []
    for name, option in {"padded": [], "packed": ["--packing"]}.items():
        ran = loretta(*command, *option, "--output", tmp_path / name)
        assert ran.code == 0, ran.err
        found.append(weights(tmp_path / name))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", [True, False], ids=["sees-the-row-before", "takes-no-positions"])
def test_refuses_to_pack_for_a_model_that_would_mix_rows(
    loretta, llama, book, tmp_path, monkeypatch, positions
) -> None:
    forward = LlamaForCausalLM.forward

    def ignoring(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    def without(self, input_ids, attention_mask=None, labels=None, inputs_embeds=None):
        return forward(self, input_ids, attention_mask, labels=labels, inputs_embeds=inputs_embeds)

    monkeypatch.setattr(LlamaForCausalLM, "forward", ignoring if positions else without)
    command = ["--model", llama, "--data", book, "--method", "rep", *LM, "--packing", "--output", tmp_path / "out"]
    ran = loretta("finetune", *command)
    assert ran.code == 2
    message = ran.err.splitlines()[-1]
    assert message.startswith("loretta finetune: error: --packing does not go with this model: ")
    assert ("it lets a row see those before it" if positions else "unexpected keyword argument") in message


class Writer:
    """A SummaryWriter that keeps the names of what it is given."""

    def __init__(self, log_dir: str):
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.file = Path(log_dir) / "events"

    def add_text(self, *_) -> None: ...

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self.file.open("a") as file:
            file.write(f"{name} {step}\n")

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_what_the_trainer_gives_is_passed_on(loretta, llama, book, tmp_path, monkeypatch) -> None:
    tensorboard = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    options = ["--report-to", "tensorboard", "--eval-steps", 4, "--optim", "adafactor", "--save-steps", 4]
    command = ["finetune", "--model", llama, "--data", book, "--method", "rep", *LM, *options]
    ran = loretta(*command, "--output", tmp_path / "out", "--json", "--plot")
    assert ran.code == 0, ran.err
    assert re.findall(r"step (\d+): held-out loss", ran.err) == ["4", "8", "12"]
    assert ran.result()["after"]["loss"] < ran.result()["before"]["loss"]
    logged = (tmp_path / "out" / "logs" / "events").read_text().splitlines()
    assert {"train/loss 1", "train/loss 12", "eval/loss 8", "eval/perplexity 12"} <= set(logged)
    evaluated = weights(tmp_path / "out")

    where = command.index("--eval-steps")
    assert loretta(*command[:where], *command[where + 2 :], "--output", tmp_path / "other").code == 0
    assert all(torch.equal(value, evaluated[name]) for name, value in weights(tmp_path / "other").items())


def test_chats_and_completions_train(loretta, llama, tmp_path) -> None:
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    for name, row in {"chat": {"messages": turns}, "ask": {"prompt": "2+2=", "completion": "4"}}.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text((json.dumps(row) + "\n") * 20)
        arguments = ["--model", llama, "--data", data, "--method", "rep", "--steps", 8, "--output", tmp_path / name]
        ran = loretta("finetune", *arguments, "--gradient-checkpointing", "--grad-accum", 2, "--json")
        assert ran.code == 0, ran.err
        assert ran.result()["after"]["loss"] < ran.result()["before"]["loss"]


def test_a_diverged_run_is_not_saved(loretta, llama, book, tmp_path) -> None:
    arguments = ["--model", llama, "--data", book, "--method", "adp", *LM, "--lr", 1e30, "--output", tmp_path / "out"]
    ran = loretta("finetune", *arguments)
    assert ran.code == 2
    assert "the training diverged" in ran.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_readable_result_names_what_was_done(loretta, llama, book, tmp_path) -> None:
    ran = loretta("finetune", "--model", llama, "--data", book, "--method", "rep", *LM, "--output", tmp_path / "out")
    names = [line.split("  ")[0] for line in ran.out.splitlines()]
    assert names == ["method", "trainable parameters", "perplexity before", "perplexity after", "training", "adapter"]
    assert "training: 100%" in ran.err
