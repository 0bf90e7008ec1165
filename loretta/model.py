"""The two methods as PEFT tuners: PEFT injects, saves, loads, switches; this decides what is adapted and how."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ._versions import check_modules_are_loaded
from .adp import MERGE_ERROR, LorettaAdpLinear
from .block import NAME, LorettaAdpBlock, block_width
from .config import LorettaAdpConfig, _LorettaConfig
from .coverage import also_excluding, check_targets, warn_of_unused_ranks, warn_of_what_is_left_out
from .layer import LorettaLayer, adapter_train
from .merging import declare_biases
from .norms import norm_names
from .quantised import check_can_be_trained_whole, check_gradients_pass, keep_unpacked
from .rep import LorettaRepLinear
from .targets import ADP_TARGETS, FAMILIES, REP_TARGETS
from .uncalled import FirstStep, forget_first_step, leave_fast_paths, return_to_fast_paths
from .whole import TrainedWhole


class _LorettaModel(BaseTuner):
    """What both methods share: norms and the tensorised head, and mixed batches."""

    tuner_layer_cls: type[LorettaLayer]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as PEFT does, from a copy of the config: resolving it must not change the caller's.

        In inference mode, as when an adapter is loaded, it is kept: PEFT promises that the model holds that object.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, _LorettaConfig)
        if not config.inference_mode:
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
            check_gradients_pass(model)
        keep_unpacked(model)
        given = config.target_modules
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        leave_fast_paths(model)
        if not config.inference_mode:
            FirstStep(model)
        warn_of_unused_ranks(model, adapter_name, config)
        warn_of_what_is_left_out(model, adapter_name, config, given)
        if path := _tensorised_head(config, model):
            self._tensorise_head(model, adapter_name, config, path)
        for module in model.modules():
            if type(module) is ModulesToSaveWrapper:
                TrainedWhole.adopt(module)
        whole = [module for module in model.modules() if isinstance(module, TrainedWhole)]
        for module in model.modules():
            if isinstance(module, LorettaLayer):
                module.trained_whole = whole
        self._cast_adapter_dtype(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Hold all that the adapter trains in fp32 beside a base of sixteen bits, or else in the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, TrainedWhole) and autocast_adapter_dtype:
                module.widen(adapter_name)
            elif isinstance(module, (LorettaLayer, TrainedWhole)) and not autocast_adapter_dtype:
                module.follow_base_dtype(adapter_name)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, _LorettaConfig)
        names = list(peft_config.modules_to_save or [])
        if path := _tensorised_head(peft_config, model):
            names.append(path.split(".")[0])
        check_can_be_trained_whole(model, names)
        if peft_config.train_layernorm:
            names += norm_names(model, names)
        peft_config.modules_to_save = list(dict.fromkeys(names)) or None
        check_modules_are_loaded(peft_config.modules_to_save)
        check_targets(model, peft_config, partial(self._check_target_module_exists, peft_config))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = super()._prepare_adapter_config(peft_config, model_config)
        assert isinstance(config, _LorettaConfig)
        if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform needs target_modules as a list of names, but the default of "
                f"{model_config['model_type']!r} is a regex: {config.target_modules!r}"
            )
        return config

    @staticmethod
    def _tensorise_head(model: nn.Module, adapter_name: str, config: PeftConfig, path: str) -> None:
        """Put a tensor train in the place of the head's dense layer, in the adapter's copy of the head."""
        assert isinstance(config, _LorettaConfig)
        head, dense_name = path.split(".")
        for key, module in model.named_modules():
            if not isinstance(module, ModulesToSaveWrapper) or key.split(".")[-1] != head:
                continue
            if adapter_name not in module.modules_to_save:
                continue
            own = module.modules_to_save[adapter_name]
            dense = getattr(own, dense_name, None)
            if not isinstance(dense, nn.Linear):
                continue
            sizes, has_bias = (dense.in_features, dense.out_features), dense.bias is not None
            train = adapter_train(config, *sizes, config.tensor_rank, bias=has_bias, head=True)
            if not train.cores.is_meta:  # as PEFT's low_cpu_mem_usage has it, until weights are loaded
                train.to(dense.weight.device)
            setattr(own, dense_name, train.requires_grad_(dense.weight.requires_grad))

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, _LorettaConfig)
        if isinstance(target, self.tuner_layer_cls):
            layer = target
        elif (block := self._block(target, current_key)) is not None:
            layer = block
        else:
            try:
                layer = self.tuner_layer_cls(target, **get_quantization_kwargs(self))
            except TypeError as error:
                raise ValueError(f"target module {current_key!r}: {error}") from None
            setattr(parent, target_name, layer)
        layer.add_adapter(adapter_name, peft_config, current_key, **self._adapter_options(peft_config, current_key))

    def _block(self, target: nn.Module, key: str) -> LorettaLayer | None:
        """The layer of a target that is a whole block and no linear; None where a method adapts linears only."""
        return None

    def _adapter_options(self, config: _LorettaConfig, key: str) -> dict[str, Any]:
        """Arguments of ``add_adapter`` beyond the config, for the layer called ``key``."""
        return {}

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """Unload as PEFT does; without merging, whatever is merged is taken out first."""
        if not merge and any(isinstance(module, LorettaLayer) and module.merged for module in self.model.modules()):
            self.unmerge_adapter()
        super()._unload_and_optionally_merge(merge, *args, **kwargs)  # returns self.model, whatever its annotation
        forget_first_step(self.model)
        return_to_fast_paths(self.model)
        return self.model

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], config: PeftConfig
    ) -> dict[str, torch.Tensor]:
        """The trained biases of the base: of merged layers those that nothing is merged into."""
        found = super()._get_learnable_bias_state_dict(model, state_dict, config)
        for name, layer in model.named_modules():
            key = f"{name}.base_layer.bias"
            if isinstance(layer, LorettaLayer) and layer.merged and key in found:
                bias = layer.unmerged_linear().bias
                if bias is None:
                    del found[key]
                else:
                    found[key] = bias.detach()
        return found

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version assigns child.weight, which not all wrapped heads and norms have.
        if isinstance(child, LorettaAdpBlock):
            child.detach_from_block()
        else:
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` to every layer for the time of one forward, as PEFT's LoRA does."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, self.tuner_layer_cls)]
        known = {name for layer in layers for name in layer._get_available_adapters()}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {sorted(known)}"
            )
        # Beam search repeats the rows of a batch, but not before an encoder has seen them.
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else self.model
        once = set() if encoder is self.model else set(encoder.modules())
        handles = []
        for module in self.modules():
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper)):
                repeats = 1 if module in once else beams
                names = [name for name in adapter_names for _ in range(repeats)]
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _tensorised_head(config: PeftConfig, model: nn.Module) -> str | None:
    """Where the dense layer is that the config wants as a tensor train, such as "classifier.dense"."""
    assert isinstance(config, _LorettaConfig)
    if config.task_type != TaskType.SEQ_CLS or not config.tensorize_head:
        return None
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    return family.head if family else None


class LorettaRepModel(_LorettaModel):
    """LoRETTA_rep on a model; made by ``get_peft_model(model, LorettaRepConfig(...))``.

    Example:
        >>> tuned = get_peft_model(model, LorettaRepConfig(task_type="CAUSAL_LM"))
        >>> type(tuned.base_model).__name__
        'LorettaRepModel'
        >>> plain = tuned.merge_and_unload()
    """

    prefix = "loretta_rep_"
    tuner_layer_cls = LorettaRepLinear
    target_module_mapping = REP_TARGETS  # type: ignore[assignment]


class LorettaAdpModel(_LorettaModel):
    """LoRETTA_adp on a model; made by ``get_peft_model(model, LorettaAdpConfig(...))``.

    Example:
        >>> tuned = get_peft_model(model, LorettaAdpConfig(task_type="CAUSAL_LM"))
        >>> type(tuned.base_model).__name__
        'LorettaAdpModel'
    """

    prefix = "loretta_adp_"
    tuner_layer_cls = LorettaAdpLinear
    target_module_mapping = ADP_TARGETS  # type: ignore[assignment]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, LorettaAdpConfig)
        family = FAMILIES.get(model_config.get("model_type", ""))
        if peft_config.target_modules is None and peft_config.use_adapterp and family:
            if not family.after:
                raise ValueError(
                    f"use_adapterp: no exit of the feed-forward blocks of {model_config['model_type']!r} is known; "
                    f"name target_modules"
                )
            peft_config.target_modules = set(family.after)
            peft_config.exclude_modules = also_excluding(peft_config.exclude_modules, family.after_attention)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _block(self, target: nn.Module, key: str) -> LorettaLayer | None:
        if isinstance(target, (nn.Linear, Conv1D, BaseTunerLayer)) or hasattr(target, "in_features"):
            return None
        if resolve_quantization_backend(target) is not None:
            return None
        return getattr(target, NAME, None) or LorettaAdpBlock(target, block_width(self.model, key))

    def _adapter_options(self, config: _LorettaConfig, key: str) -> dict[str, Any]:
        assert isinstance(config, LorettaAdpConfig)
        return {"placement": self._placement(config, key)}

    def _placement(self, config: LorettaAdpConfig, key: str) -> str:
        """Where the adapter of the linear called ``key`` goes."""
        if config.use_parallel_adapter:
            return "parallel_adapter"
        if config.use_adapterp:
            return "output_adapter"
        if isinstance(config.adapter_type, str):
            return config.adapter_type
        for name, placement in (config.adapter_type or {}).items():
            if _ends_with(key, name):
                return placement
        family = FAMILIES.get(self.get_model_config(self.model).get("model_type", ""))
        before = (*family.before, *family.before_if_named) if family else ()
        return "mh_adapter" if any(_ends_with(key, name) for name in before) else "output_adapter"

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge as PEFT does, if every adapter that is asked for is linear.

        Raises:
            ValueError: one is not; nothing is merged then.
        """
        self._check_linear(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_linear(adapter_names)
        bare = [
            name
            for name, layer in self.model.named_modules()
            if isinstance(layer, LorettaAdpLinear)
            and not isinstance(layer, LorettaAdpBlock)
            and getattr(layer.unmerged_linear(), "bias", None) is None
        ]
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        declare_biases(model, [name for name in bare if getattr(model.get_submodule(name), "bias", None) is not None])
        return model

    def _check_linear(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            config = self.peft_config.get(name)
            if isinstance(config, LorettaAdpConfig) and config.activation != "identity":
                raise ValueError(MERGE_ERROR)
            for layer in self.model.modules():
                if isinstance(layer, LorettaAdpBlock) and layer.has_adapter(name):
                    layer.merge()  # raises

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Also for files of the time when a learned scale was named without its last part."""
        state_dict = {
            f"{key}.value" if key.endswith(".loretta_adp_scaling") else key: value for key, value in state_dict.items()
        }
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)
