"""The kernels run in Triton's interpreter, on the CPU, unless there is a GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read when the first kernel is defined, which no module does at import.
    os.environ["TRITON_INTERPRET"] = "1"
