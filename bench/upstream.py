"""The released implementation, `loretta==0.1.0` from PyPI, as a peer.

`make peers` installs it into a folder of its own, without dependencies. It is loaded as `upstream_loretta`, never as
`loretta`, so it never meets our package; all of its imports of itself are relative. It runs unchanged with the versions
of constraints.txt. Its layers come from its own `get_peft_model`, on a model of one or two bare linears.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import LlamaConfig, RobertaConfig, RobertaForSequenceClassification

FOLDER = Path(__file__).parents[1] / ".cache" / "peers" / "upstream" / "loretta"
NAME = "upstream_loretta"


class Unavailable(Exception):
    """A peer that cannot run here; the message says why."""


@cache
def load() -> ModuleType:
    """The package.

    Raises:
        Unavailable: it is not installed, or cannot be imported.
    """
    if not FOLDER.is_dir():
        raise Unavailable("not installed: make peers")
    spec = spec_from_file_location(NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[NAME] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Unavailable(f"import: {type(error).__name__}: {error}") from error
    return module


def version() -> str | None:
    """The name and version of what is installed, or None where nothing is."""
    found = next(iter(distributions(name="loretta", path=[str(FOLDER.parent)])), None)
    return f"loretta {found.version}" if found else None


class _Linears(nn.Module):
    """What get_peft_model needs of a causal language model, and linears to wrap."""

    def __init__(self, names: tuple[str, ...], in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = LlamaConfig()
        for name in names:
            self.add_module(name, skip_init(nn.Linear, in_features, out_features, bias=False))

    def prepare_inputs_for_generation(self) -> None:
        """Asked for by name only."""


def adp_config(rank: int, targets: list[str] | None = None, task_type: str = "CAUSAL_LM"):
    """Its adapter configuration, as its documentation gives it."""
    return load().LorettaAdpConfig(
        bottleneck_size=64,
        non_linearity="relu",
        adapter_dropout=0.0,
        target_modules=targets,
        scaling=1.0,
        bias="none",
        task_type=task_type,
        tensor_rank=rank,
    )


def rep_config(r: int, rank: int, targets: list[str] | None = None):
    """Its reparameterised update."""
    return load().LorettaRepConfig(
        r=r,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        tensor_rank=rank,
    )


def projections(kind: str, d: int, width: int, rank: int) -> tuple[nn.Module, ...]:
    """Its two projections, d to width and back, or for kind "cls" its d x d layer.

    Raises:
        Unavailable: it does not support the size, as its error says.
    """
    package = load()
    try:
        if kind == "cls":
            roberta = RobertaConfig(
                hidden_size=d,
                num_attention_heads=8,
                intermediate_size=8,
                num_hidden_layers=1,
                vocab_size=8,
                max_position_embeddings=8,
            )
            model = RobertaForSequenceClassification(roberta)
            package.get_peft_model(model, adp_config(rank, task_type="SEQ_CLS"))
            return (tensorised(model.classifier)[0],)
        if kind == "adp":
            holder = _Linears(("up_proj",), d, 8)
            package.get_peft_model(holder, adp_config(rank, ["up_proj"]))
            return holder.up_proj.adapter_down, holder.up_proj.adapter_up
        holder = _Linears(("q_proj", "v_proj"), d, d)
        package.get_peft_model(holder, rep_config(width, rank, ["q_proj", "v_proj"]))
        return holder.q_proj.lora_A, holder.q_proj.lora_B
    except KeyError as error:
        raise Unavailable(f"no shape for {d}: KeyError: {error}") from error


def tensorised(module: nn.Module) -> list[nn.Module]:
    """The tensorised linears inside."""
    return [child for child in module.modules() if isinstance(getattr(child, "tensor", None), nn.Module)]


def cores(module: nn.Module) -> list[nn.Parameter]:
    """The cores of the one tensor train inside."""
    (linear,) = tensorised(module)
    return list(linear.tensor.factors)


@torch.no_grad()
def set_cores(module: nn.Module, make) -> None:
    """Give it the train that `make(modes)` returns."""
    factors = cores(module)
    for factor, core in zip(factors, make([factor.shape[1] for factor in factors]), strict=True):
        factor.copy_(core)


def bias(module: nn.Module) -> nn.Parameter:
    """The bias of the one tensorised linear inside."""
    (linear,) = tensorised(module)
    return linear.bias


@torch.no_grad()
def set_bias(module: nn.Module, value: torch.Tensor) -> None:
    """Give it this bias."""
    bias(module).copy_(value)
