"""In a fresh process: import loretta, then load saved adapters by PEFT's auto class and transformers' load_adapter."""

from __future__ import annotations

import json
import sys

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import loretta  # noqa: F401  registers the methods
from tests.tiny_models import tiny_logits

torch.set_num_threads(1)
root, loaded_by_transformers = json.load(sys.stdin)
for name in ("adp", "rep", "rep-without-norms"):
    model = AutoPeftModelForCausalLM.from_pretrained(f"{root}/{name}/adapter", attn_implementation="eager").eval()
    torch.save(tiny_logits(model, "CAUSAL_LM"), f"{root}/{name}/auto.pt")
    if name not in loaded_by_transformers:
        continue
    base = AutoModelForCausalLM.from_pretrained(root + "/base", attn_implementation="eager")
    base.load_adapter(f"{root}/{name}/adapter")
    torch.save(tiny_logits(base.eval(), "CAUSAL_LM"), f"{root}/{name}/native.pt")
