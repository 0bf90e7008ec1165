"""The reported loss is the mean over what is predicted, whatever the batches and their padding."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loretta.cli.encode import IGNORED, Collator, Examples
from loretta.cli.metrics import evaluate

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
    found = evaluate(model, Examples(items), Collator(tokenizer), batch_size, "causal_lm", "test")
    assert expected.numel() == 4 + 2
    assert found["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found["perplexity"] == math.exp(found["loss"])


def test_accuracy_is_the_share_of_right_rows(roberta, tokenizer) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(roberta, num_labels=3).eval()
    best = [int(model(torch.tensor([ids])).logits.argmax()) for ids in IDS]
    items = [{"input_ids": IDS[0], "labels": best[0]}, {"input_ids": IDS[1], "labels": (best[1] + 1) % 3}]
    assert evaluate(model, Examples(items), Collator(tokenizer), 2, "seq_cls", "test")["accuracy"] == 0.5
