"""In a fresh process without loretta: transformers' own ``load_adapter`` on every exported LoRA."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_logits

torch.set_num_threads(1)
root, names = json.load(sys.stdin)
for name in names:
    model = AutoModelForCausalLM.from_pretrained(root + "/base", attn_implementation="eager")
    model.load_adapter(f"{root}/{name}/lora")
    torch.save(tiny_logits(model.eval(), "CAUSAL_LM"), f"{root}/{name}/transformers.pt")
assert not any(name.startswith("loretta") for name in sys.modules)
