"""`loretta params` prints the counts that the paper's tables give, and the sizes of the models as published."""

import pytest

from loretta.cli.parser import PRESETS

# group -> running total up to it
PAPER = {
    "llama-2-7b-adp": (["llama-2-7b", "adp"], {"cores": 211_200, "biases": 610_560, "norms": 876_800}),
    "llama-2-7b-rep": (["llama-2-7b", "rep", "--r", 16, "--rank", 8], {"cores": 241_664, "norms": 507_904}),
    "llama-2-13b-adp": (["llama-2-13b", "adp", "--rank", 8], {"norms": 1_676_160}),
    "deberta-base-adp": (
        ["deberta-base", "adp"],
        {"biases": 57_408, "norms": 95_808, "tensorised head": 97_656, "head": 99_194},
    ),
    "deberta-base-rep": (
        ["deberta-base", "rep", "--r", 8],
        {"cores": 13_980, "norms": 52_380, "tensorised head": 54_228},
    ),
    "roberta-base-rep": (
        ["roberta-base", "rep", "--r", 8],
        {"cores": 27_840, "norms": 66_240, "tensorised head": 68_088},
    ),
}

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-405b": 405_853_388_800,
    "deberta-base": 139_193_858,
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
}


@pytest.mark.parametrize(("arguments", "totals"), PAPER.values(), ids=PAPER)
def test_counts_are_the_papers(loretta, arguments, totals) -> None:
    model, method, *options = arguments
    ran = loretta("params", "--model", model, "--method", method, *options, "--json")
    assert ran.code == 0, ran.err
    running_totals = ran.result()["running_totals"]
    assert {group: running_totals[group] for group in totals} == totals
    assert ran.result()["trainable"] == sum(ran.result()["groups"].values())


@pytest.mark.parametrize("model", PRESETS)
def test_presets_have_the_published_size(loretta, model) -> None:
    ran = loretta("params", "--model", model, "--method", "rep", "--no-train-layernorm", "--json")
    assert ran.result()["base"] == PUBLISHED[model]


def test_prints_groups_running_totals_and_share(loretta) -> None:
    ran = loretta("params", "--model", "llama-2-7b", "--method", "adp")
    assert ran.err == ""
    assert [line.split() for line in ran.out.splitlines()] == [
        ["group", "parameters", "running", "total"],
        ["cores", "211,200", "211,200"],
        ["biases", "399,360", "610,560"],
        ["norms", "266,240", "876,800"],
        ["trainable:", "876,800", "of", "6,738,415,616", "(0.0130", "%)"],
    ]


@pytest.mark.parametrize(
    ("options", "group"),
    [
        (["adp", "--dense"], "dense adapters"),
        (["adp", "--scaling", "learned"], "scalings"),
        (["rep", "--bias", "lora_only", "--no-train-layernorm"], "base biases"),
    ],
)
def test_whatever_else_is_trained_has_its_own_group(loretta, options, group) -> None:
    ran = loretta("params", "--model", "opt-1.3b", "--method", *options, "--json")
    assert ran.result()["groups"][group] > 0


def test_counts_a_model_folder_and_a_configuration_file(loretta, llama) -> None:
    counts = [
        loretta("params", "--model", path, "--method", "rep", "--json") for path in (llama, llama / "config.json")
    ]
    assert counts[0].result()["groups"] == counts[1].result()["groups"]
    assert counts[0].result()["groups"]["norms"] == 5 * 32
