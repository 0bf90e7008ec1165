"""One Llama with random weights, wrapped by every method; all of them share its weights, and compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import upstream
from bench.memory import peak_bytes
from bench.trains import flat, wave_cores
from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.tensor_train import TensorTrain
from loretta_kernels import TT, TTShape, reference

R, RANK = 8, 5
OURS, RELEASED = {"adp": "loretta adp", "rep": "loretta rep"}, {"adp": "upstream adp", "rep": "upstream rep"}
BASE, LORA = "frozen base", "LoRA r=8"


def llama(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The base model, frozen."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules with the same weights and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def our_config(kind: str) -> LorettaAdpConfig | LorettaRepConfig:
    """Ours of upstream's kind: the same adapters at the same places; no gains, and norms that are frozen, as there."""
    same: dict[str, Any] = {"core_gain": "paper", "train_layernorm": False, "task_type": "CAUSAL_LM"}
    if kind == "adp":
        return LorettaAdpConfig(tensor_rank=RANK, **same)
    return LorettaRepConfig(r=R, tensor_rank=RANK, lora_dropout=0.0, **same)


def methods() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What wraps a model, by name."""
    lora = LoraConfig(r=R, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return {
        OURS["adp"]: lambda model: get_peft_model(model, our_config("adp")),
        OURS["rep"]: lambda model: get_peft_model(model, our_config("rep")),
        LORA: lambda model: get_peft_model(model, lora),
        RELEASED["adp"]: lambda model: upstream.load().get_peft_model(model, upstream.adp_config(RANK)),
        RELEASED["rep"]: lambda model: upstream.load().get_peft_model(model, upstream.rep_config(R, RANK)),
    }


@torch.no_grad()
def set_functions(model: nn.Module) -> None:
    """Give the adapters of a wrapped model those trains, and biases of zero, that all methods of its kind are given."""
    for seed, matrix in enumerate(_matrices(model)):
        matrix(seed)


def _matrices(model: nn.Module) -> Iterator[Callable[[int], None]]:
    """For each matrix of each adapter, in the base model's order, what sets it."""
    for module in model.modules():
        if isinstance(module, TensorTrain):
            yield lambda seed, train=module: _set_ours(train, seed)
        elif isinstance(module, LoraLayer):
            for factor in (module.lora_A["default"], module.lora_B["default"]):
                yield lambda seed, linear=factor: _set_linear(linear, seed)
        elif isinstance(getattr(module, "tensor", None), nn.Module):
            yield lambda seed, train=module: _set_upstream(train, seed)


def _set_ours(train: TensorTrain, seed: int) -> None:
    scale = _scale(train.in_features)
    train.cores.copy_(flat(wave_cores(train.shape.modes, RANK, scale, seed)))
    if train.bias is not None:
        train.bias.zero_()


def _set_upstream(train: nn.Module, seed: int) -> None:
    scale = _scale(train.in_features)
    upstream.set_cores(train, lambda modes: wave_cores(modes, RANK, scale, seed))
    if isinstance(train.bias, Tensor):
        train.bias.zero_()


def _set_linear(linear: nn.Linear, seed: int) -> None:
    shape = TTShape.for_matrix(linear.in_features, linear.out_features, RANK)
    cores = wave_cores(shape.modes, RANK, _scale(linear.in_features), seed)
    linear.weight.copy_(reference.tt_matrix(TT(flat(cores), shape)).t())


def _scale(in_features: int) -> float:
    """Of every wave, so that an adapter changes what it is added to by about a tenth."""
    return 0.2 * in_features**-0.5


class Step:
    """A model's forward, backward and optimiser, on given embeddings.

    The embeddings need a gradient in every model, the frozen base too: all of them send it down the whole model.

    Attributes:
        answers: the loss and the gradient of the embeddings.
        peak_bytes: the most that forward and backward have allocated at once.
    """

    def __init__(self, model: nn.Module, embeddings: Tensor, labels: Tensor) -> None:
        self.model, self.embeddings, self.labels = model.train(), embeddings, labels
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A rate of 0 keeps the function what it was checked to be, at the cost of any other.
        self.optimiser = torch.optim.AdamW(self.parameters, lr=0.0) if self.parameters else None
        self.answers: tuple[Tensor, ...] = ()
        self.peak_bytes = peak_bytes(self._answer, embeddings.device)

    def _answer(self) -> None:
        """Keep the loss and the embeddings' gradient, and give the optimiser its gradients."""
        loss = self.forward()
        of_embeddings, *gradients = self.backward(loss)
        self.answers = loss.detach(), of_embeddings
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def difference(self, other: Step) -> float:
        """The larger relative difference: of the losses, or of the gradients of the embeddings."""
        pairs = zip(self.answers, other.answers, strict=True)
        return max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)

    def forward(self) -> Tensor:
        """The loss."""
        logits = self.model(inputs_embeds=self.embeddings).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), self.labels.flatten())

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the embeddings and of all parameters."""
        return torch.autograd.grad(loss, [self.embeddings, *self.parameters])

    def optimise(self) -> None:
        """A step of AdamW."""
        if self.optimiser is not None:
            self.optimiser.step()
