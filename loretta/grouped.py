"""Many adapters of one configuration on one model, from stacked tensors: a batch whose rows use any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from loretta_kernels import TT, Groups

from .layer import LorettaLayer
from .norms import is_feature_norm
from .stacked import Mixed, Trains
from .whole import TrainedWhole


class AdapterStack:
    """The tensors of many adapters of one configuration, stacked, in the layers of a model that has one such adapter.

    The adapters need not be known to PEFT: the model's own one gives the places, shapes and options, and its values are
    not used. Trained norms are stacked like trains. The tensors are read at each call, so they may be written to in
    between, as a store does that replaces one adapter by another.

    Args:
        model: a ``PeftModel`` with a LoRETTA adapter.
        tensors: named as in an adapter's saved file, each with one dimension more, the first: the adapters.
        adapter: the model's adapter whose configuration they have; by default its active one.

    Attributes:
        adapters: how many are stacked.

    Raises:
        ValueError: tensors are missing, of another shape, or of unlike numbers of adapters; or the adapter trains whole
            modules other than norms, such as a head.
        TypeError: the adapter's projections are dense.

    Example:
        >>> from peft import get_peft_model_state_dict
        >>> tuned = get_peft_model(model, LorettaRepConfig(task_type="CAUSAL_LM")).eval()
        >>> saved = get_peft_model_state_dict(tuned)
        >>> stack = AdapterStack(tuned, {name: torch.stack([tensor] * 3) for name, tensor in saved.items()})
        >>> with torch.no_grad(), stack.serving(torch.tensor([2, -1])):
        ...     logits = tuned(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]])).logits
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter: str | None = None) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LorettaLayer)}
        if adapter is None:
            active = {name for layer in layers.values() for name in layer.active_adapters}
            if len(active) != 1:
                raise ValueError(f"name the adapter whose configuration is stacked: {sorted(active)} are active")
            (adapter,) = active
        layers = {name: layer for name, layer in layers.items() if layer.has_adapter(adapter)}
        if not layers:
            raise ValueError(f"the model has no LoRETTA adapter {adapter!r}")
        stacks = _Stacks(tensors)
        self._trains = [(layer, stacks.trains(name, layer, adapter)) for name, layer in layers.items()]
        self._norms = [
            (module, stacks.norm(name, module, adapter))
            for name, module in model.named_modules()
            if isinstance(module, TrainedWhole) and adapter in module.modules_to_save
        ]
        if stacks.unused:
            raise ValueError(
                f"{len(stacks.unused)} tensors are of no module of {adapter!r}, such as {min(stacks.unused)!r}"
            )
        (self.adapters,) = stacks.counts

    @contextmanager
    def serving(self, index: Groups | torch.Tensor) -> Iterator[None]:
        """Give each row of the batches that the model sees inside its adapter of the stack.

        The base runs once for all rows, and each layer's adapters in one call. It is the model that is changed: no
        other thread may use it meanwhile.

        Args:
            index: int64 or int32 for the first dimensions of the model's input: [B], an adapter for each sequence, or
                [B, T], one for each token. -1 is the base alone. A tensor is checked and sorted here, once;
                ``Groups.of`` does it ahead.

        Raises:
            ValueError: an adapter that is not in the stack; a model that is served already.
        """
        groups = index if isinstance(index, Groups) else Groups.of(index, self.adapters)
        if groups.adapters != self.adapters:
            raise ValueError(f"index groups {groups.adapters} adapters, but {self.adapters} are stacked")
        served: list[LorettaLayer | TrainedWhole] = [layer for layer, _ in self._trains]
        served += [norm for norm, _ in self._norms]
        if any(module.served is not None for module in served):
            raise ValueError("stacked adapters are served already: leave the other `serving` first")
        on_device: dict[torch.device, Groups] = {}

        def beside(tensor: torch.Tensor) -> Groups:
            return on_device.setdefault(tensor.device, groups.to(tensor.device))

        try:
            for layer, trains in self._trains:
                layer.served = Mixed(trains, beside(trains.down.cores))
            for norm, stack in self._norms:
                norm.served = stack, beside(next(iter(stack.values())))
            yield
        finally:
            for module in served:
                module.served = None


class _Stacks:
    """Stacked tensors by the names that an adapter's file has for them.

    Attributes:
        unused: the names that were not asked for.
        counts: how many adapters are stacked, and one of the names.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.unused = tensors, set(tensors)
        self.counts: dict[int, str] = {}

    def take(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The tensor of that name; raise unless it is a stack of tensors like this one."""
        stack = self.tensors.get(name)
        if stack is None:
            raise ValueError(f"no stacked tensor {name!r}")
        if stack.dim() != like.dim() + 1 or stack.shape[1:] != like.shape:
            raise ValueError(f"{name!r} must be [adapters, {', '.join(map(str, like.shape))}], got {list(stack.shape)}")
        self.counts.setdefault(len(stack), name)
        if len(self.counts) > 1:
            counts = " and ".join(f"{count} in {name!r}" for count, name in self.counts.items())
            raise ValueError(f"all tensors must stack as many adapters, got {counts}")
        self.unused.discard(name)
        return stack

    def trains(self, name: str, layer: LorettaLayer, adapter: str) -> Trains:
        """The stacked trains of a layer."""
        like, down, up, scale = layer.trains(adapter)
        first, second, *learnt = (f"{name}.{kind}" for kind in layer.adapter_layer_names)
        if isinstance(scale, torch.Tensor):
            scale = self.take(f"{learnt[0]}.value", scale).view(-1)
        return Trains(like, self.train(first, down), self.train(second, up), scale)

    def train(self, name: str, like: TT) -> TT:
        """A stacked train."""
        bias = None if like.bias is None else self.take(f"{name}.bias", like.bias)
        return TT(self.take(f"{name}.cores", like.cores), like.shape, bias)

    def norm(self, name: str, module: TrainedWhole, adapter: str) -> dict[str, torch.Tensor]:
        """The stacked parameters of a norm."""
        if not is_feature_norm(module.original_module):
            raise ValueError(f"{name!r} is trained whole by {adapter!r}: of such modules only norms can be stacked")
        own = module.modules_to_save[adapter]
        return {key: self.take(f"{name}.{key}", like) for key, like in own.named_parameters()}
