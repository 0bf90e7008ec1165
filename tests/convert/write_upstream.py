"""Run the released package and let it write an adapter folder per case, with the logits it gives.

    pip install --no-deps --target WHEEL loretta==0.1.0
    PYTHONPATH=WHEEL python tests/convert/write_upstream.py OUT [CASE ...]

The committed fixtures were written with OUT = tests/convert/fixtures.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import bases
import torch

import loretta

if not hasattr(loretta, "tensor_layers"):
    sys.exit(f"{loretta.__file__} is not the released package")
torch.set_num_threads(1)
out = Path(sys.argv[1])
for name in sys.argv[2:] or bases.CASES:
    _, _, method, fields, complete = bases.CASES[name]
    make = loretta.LorettaAdpConfig if method == "adp" else loretta.LorettaRepConfig
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every layer
        config = make(**{"target_modules": None, "task_type": bases.task_of(name), **fields})
        model = loretta.get_peft_model(bases.base_model(name), config)
    names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    model.save_pretrained(out / name)
    saved = torch.load(out / name / "adapter_model.bin", weights_only=True)
    trained = {key: parameter for key, parameter in model.named_parameters() if key in (names if complete else saved)}
    bases.fill(trained.items(), 0.35)
    model.save_pretrained(out / name)
    if complete:
        # The way of docs/from-upstream.md.
        tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.save(tensors, out / name / "adapter_model.bin")
    for module in model.modules():
        module.training = False  # its rep layers raise on .eval() once they were saved
    with contextlib.redirect_stdout(io.StringIO()):
        result = bases.logits(model)
    lost = [key.removeprefix("base_model.model.") for key in names if key not in saved]
    expected = {"logits": result.tolist(), "trained_but_not_saved": lost}
    (out / name / "expected.json").write_text(json.dumps(expected) + "\n")
