"""Which device a model is loaded on."""

import pytest
import torch

from loretta.cli import distributed


def raises() -> None:
    raise RuntimeError("Cannot access accelerator device when none is available.")  # as torch 2.6


@pytest.mark.parametrize("current", [lambda: torch.device("cuda"), raises], ids=["names-cuda", "raises"])
def test_torch_built_for_cuda_uses_the_cpu_where_there_is_no_gpu(monkeypatch, current) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert distributed.device() == torch.device("cpu")
    assert distributed.on_cpu()
