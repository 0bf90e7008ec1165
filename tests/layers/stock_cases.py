"""In a fresh process that knows stock PEFT only: load every exported LoRA and write the logits it gives."""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel

from tests.tiny_models import AUTO_CLASSES, tiny_logits, usual_task

torch.set_num_threads(1)
for folder in json.load(sys.stdin):
    task = usual_task(folder.rsplit("/", 1)[1].split("+")[0])
    base = AUTO_CLASSES[task].from_pretrained(folder + "/base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, folder + "/lora").eval()
    assert model.active_peft_config.peft_type == "LORA"
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    torch.save((tiny_logits(model, task), adapted), folder + "/stock.pt")
assert not any(name.startswith("loretta") for name in sys.modules)
