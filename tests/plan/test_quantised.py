"""Quantised bases: the bytes that bitsandbytes' own modules hold, and what their steps keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loretta import get_peft_model
from loretta.plan import QUANTS, Batch, Devices, StepCounter, memory, quantise
from loretta.plan.step import StepBytes
from tests.plan.models import METHODS, build

bnb = pytest.importorskip("bitsandbytes")
BATCH = Batch(rows=2, seq=24)
KEPT = {"lm_head"}


def bitsandbytes_linear(linear: nn.Linear, quant: str) -> nn.Module:
    """The linear as transformers would load it."""
    options = {"bias": False, "device": "cpu"}
    if quant == "8bit":
        made = bnb.nn.Linear8bitLt(*linear.weight.shape[::-1], has_fp16_weights=False, threshold=6.0, **options)
    else:
        made = bnb.nn.Linear4bit(
            *linear.weight.shape[::-1],
            compute_dtype=linear.weight.dtype,
            compress_statistics=quant == "4bit-double",
            quant_type="nf4",
            **options,
        )
    made.load_state_dict({"weight": linear.weight.data})
    return made.to("cpu").requires_grad_(False)


def held_by(weight: Tensor) -> int:
    """Bytes of a quantised weight and of the tensors that it is dequantised by."""
    held = [weight.data, *(value for value in vars(weight).values() if isinstance(value, Tensor))]
    state = getattr(weight, "quant_state", None)
    while state is not None:
        held += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = getattr(state, "state2", None)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())


def real(monkeypatch: pytest.MonkeyPatch, quant: str) -> nn.Module:
    # On CPUs with AVX512-BF16 the first forward without grad would repack the weights.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    base = build("full", 2, dtype=torch.bfloat16, device="cpu")
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name not in KEPT:
            base.set_submodule(name, bitsandbytes_linear(module, quant))
    return base


def planned(quant: str, method: str | None = None) -> nn.Module:
    base = build("full", 2, dtype=torch.bfloat16)
    quantise(base, quant)
    return get_peft_model(base, METHODS[method], low_cpu_mem_usage=True) if method else base


@pytest.mark.parametrize("quant", QUANTS[1:])
def test_weights_take_what_bitsandbytes_takes(quant, monkeypatch) -> None:
    model = real(monkeypatch, quant)
    quantised = {
        id(module.weight): held_by(module.weight) for module in model.modules() if "bitsandbytes" in str(type(module))
    }
    assert len(quantised) == 2 * 7
    held = sum(quantised.get(id(parameter), parameter.nbytes) for parameter in model.parameters())
    held += sum(buffer.nbytes for buffer in model.buffers())
    assert memory(planned(quant), StepBytes(0, 0, 0), Devices()).weights == held


@pytest.mark.parametrize("method", ["adp", "rep", "lora"])
@pytest.mark.parametrize("quant", QUANTS[1:])
def test_a_step_keeps_what_a_real_one_keeps(quant, method, monkeypatch) -> None:
    """bitsandbytes keeps inputs in attributes, unseen by the hooks: count what is alive after the forward."""
    model = get_peft_model(real(monkeypatch, quant), METHODS[method]).train()
    inputs = BATCH.inputs()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: alive.append(keep(tensor)) or tensor, lambda t: t):
        loss = model(**inputs).loss
    for node in nodes_of(loss.grad_fn):
        for tensor in (*(getattr(node, "tensors", None) or ()), getattr(node, "A", None)):
            if isinstance(tensor, Tensor) and tensor.dtype is torch.bfloat16 and tensor.numel():
                keep(tensor)
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    counted = StepCounter(lambda few: planned(quant, method), as_on_gpu=False).count(BATCH)
    assert counted.saved == sum(kept.values())


def nodes_of(root: object) -> list[object]:
    """The nodes of an autograd graph."""
    seen, todo = {}, [root]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in seen:
            seen[id(node)] = node
            todo += [following for following, _ in node.next_functions]  # type: ignore[attr-defined]
    return list(seen.values())
