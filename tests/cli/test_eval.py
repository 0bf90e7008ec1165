"""The reported loss is the mean over what is predicted, whatever the batches; scores are those of the literature."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loretta.cli.encode import IGNORED, make_collator
from loretta.cli.eval import evaluate, scores

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.mark.parametrize("batch_size", [1, 2], ids=["no-padding", "padding"])
def test_perplexity_weighs_every_predicted_token_the_same(llama, tokenizer, batch_size) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    labels = [[IGNORED, IGNORED, *IDS[0][2:]], IDS[1]]
    expected = torch.cat(
        [
            -model(torch.tensor([ids])).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]][skipped:]
            for ids, skipped in zip(IDS, (1, 0), strict=True)
        ]
    )
    items = [{"input_ids": ids, "labels": wanted} for ids, wanted in zip(IDS, labels, strict=True)]
    found = evaluate(model, items, make_collator(tokenizer, None), batch_size, None, "test")
    assert expected.numel() == 4 + 2
    assert found["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found["perplexity"] == math.exp(found["loss"])


def test_accuracy_is_the_share_of_right_rows(roberta, tokenizer) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(roberta, num_labels=3).eval()
    best = [int(model(torch.tensor([ids])).logits.argmax()) for ids in IDS]
    items = [{"input_ids": IDS[0], "labels": best[0]}, {"input_ids": IDS[1], "labels": (best[1] + 1) % 3}]
    assert evaluate(model, items, make_collator(tokenizer, []), 2, ["a", "b", "c"], "test")["accuracy"] == 0.5


def test_a_regression_is_judged_by_its_squared_error_and_correlations(roberta, tokenizer) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(roberta, num_labels=1).eval()
    said = [model(torch.tensor([ids])).logits.item() for ids in IDS]
    items = [{"input_ids": ids, "labels": value + 2} for ids, value in zip(IDS, said, strict=True)]
    found = evaluate(model, items, make_collator(tokenizer, []), 2, [], "test")
    assert found == {"loss": pytest.approx(4), "pearson": pytest.approx(1), "spearman": pytest.approx(1)}


def test_scores_of_two_classes() -> None:
    """Five right of eight: 3 true positives, 2 true negatives, 1 false negative, 2 false positives."""
    found, wanted = np.array([1, 1, 1, 0, 0, 0, 1, 1]), np.array([1, 1, 1, 1, 0, 0, 0, 0])
    assert scores(found, wanted, ["no", "yes"]) == {
        "accuracy": 5 / 8,
        "f1": pytest.approx((2 * 3 / (2 * 3 + 3) + 2 * 2 / (2 * 2 + 3)) / 2),
        "f1_no": pytest.approx(2 * 2 / (2 * 2 + 3)),
        "f1_yes": pytest.approx(2 * 3 / (2 * 3 + 3)),
        "matthews": pytest.approx((3 * 2 - 2 * 1) / math.sqrt(5 * 4 * 4 * 3)),
    }


def test_scores_of_three_classes() -> None:
    """Matthews' correlation is that of the two indicator matrices (Gorodkin, 2004)."""
    found, wanted = np.array([0, 1, 2, 2, 1, 0, 2]), np.array([0, 1, 2, 1, 1, 2, 0])
    a, b = (np.eye(3)[numbers] - np.eye(3)[numbers].mean(0) for numbers in (found, wanted))
    result = scores(found, wanted, ["x", "y", "z"])
    assert result["matthews"] == pytest.approx((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))
    assert result["f1"] == pytest.approx((2 / 4 + 4 / 5 + 2 / 5) / 3)
    assert result.keys() == {"accuracy", "f1", "matthews"}


def test_scores_of_a_regression() -> None:
    """Equal values share a rank: [1, 2.5, 2.5, 4] against [2, 1, 3, 4]."""
    found, wanted = np.array([0.0, 5.0, 5.0, 9.0]), np.array([2.0, 1.0, 3.0, 40.0])
    ranks = np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3, 4])[0, 1]
    expected = {"pearson": np.corrcoef(found, wanted)[0, 1], "spearman": ranks}
    assert scores(found, wanted, []) == pytest.approx(expected)


def test_a_score_that_is_not_defined_is_zero() -> None:
    same = np.zeros(4)
    assert scores(same, same, ["a", "b"])["matthews"] == 0
    assert scores(same, np.arange(4.0), []) == {"pearson": 0, "spearman": 0}
