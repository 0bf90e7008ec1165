"""In a fresh process: reload every saved adapter onto its saved base and write the logits it gives."""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel

import loretta  # noqa: F401  registers the methods
from tests.tiny_models import AUTO_CLASSES, DTYPES, tiny_logits, usual_task

torch.set_num_threads(1)
for folder in json.load(sys.stdin):
    model_type, _, dtype = folder.rsplit("/", 1)[1].split("+")
    task = usual_task(model_type)
    base = AUTO_CLASSES[task].from_pretrained(folder + "/base", dtype=DTYPES[dtype], attn_implementation="eager")
    base.to(DTYPES[dtype])  # transformers leaves DeBERTa's q_bias and v_bias in fp32, and the bare base then fails
    model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
    torch.save(tiny_logits(model, task), folder + "/reloaded.pt")
