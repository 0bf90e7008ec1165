"""The two methods as PEFT tuners: PEFT injects, saves, loads, switches; this decides what is adapted and how."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from ._versions import check_modules_are_loaded
from .adp import MERGE_ERROR, LorettaAdpLinear
from .config import LorettaAdpConfig, _LorettaConfig
from .layer import LorettaLayer, train_shape
from .norms import norm_names
from .quantised import check_can_be_trained_whole, check_gradients_pass, keep_unpacked
from .rep import LorettaRepLinear
from .targets import FAMILIES, TargetTable
from .tensor_train import TensorTrain


class _LorettaModel(BaseTuner):
    """What both methods share: norms and the tensorised head, and mixed batches."""

    tuner_layer_cls: type[LorettaLayer]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as PEFT does, from a copy of the config: resolving it must not change the caller's.

        A config given to load by is kept: PEFT promises that the model holds that very object.
        """
        config = self.peft_config[adapter_name]
        if not config.inference_mode:
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
            check_gradients_pass(model)
        keep_unpacked(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if path := _tensorised_head(config, model):
            self._tensorise_head(model, adapter_name, config, path)

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
            shape = train_shape(config, dense.in_features, dense.out_features, config.tensor_rank)
            train = TensorTrain(shape, bias=dense.bias is not None)
            setattr(own, dense_name, train.to(dense.weight.device).requires_grad_(dense.weight.requires_grad))

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
        else:
            try:
                layer = self.tuner_layer_cls(target, **get_quantization_kwargs(self))
            except TypeError as error:
                raise ValueError(f"target module {current_key!r}: {error}") from None
            setattr(parent, target_name, layer)
        layer.add_adapter(adapter_name, peft_config, current_key, **self._adapter_options(peft_config, current_key))

    def _adapter_options(self, config: _LorettaConfig, key: str) -> dict[str, Any]:
        """What a method tells its layer called ``key`` beyond the config."""
        return {}

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """Unload as PEFT does, with merged heads dense again; without merging, norms and heads are the base's own."""
        wrappers = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        if not merge:
            for wrapper in wrappers:
                wrapper.set_adapter([])
        dtypes = {
            train: wrapper.original_module.get_submodule(name).weight.dtype
            for wrapper in wrappers
            for own in wrapper.modules_to_save.values()
            for name, train in own.named_modules()
            if isinstance(train, TensorTrain)
        }
        super()._unload_and_optionally_merge(merge, *args, **kwargs)  # returns self.model, whatever its annotation
        model = self.model
        for name, module in list(model.named_modules()):
            if isinstance(module, TensorTrain):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.to_linear(dtypes[module]))
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version assigns child.weight, which heads and norms wrapped whole do not all have.
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
    """LoRETTA_rep on a model; made by ``get_peft_model(model, LorettaRepConfig(...))``."""

    prefix = "loretta_rep_"
    tuner_layer_cls = LorettaRepLinear
    target_module_mapping = TargetTable("rep")  # type: ignore[assignment]


class LorettaAdpModel(_LorettaModel):
    """LoRETTA_adp on a model; made by ``get_peft_model(model, LorettaAdpConfig(...))``."""

    prefix = "loretta_adp_"
    tuner_layer_cls = LorettaAdpLinear
    target_module_mapping = TargetTable("before", "after", "after_attention")  # type: ignore[assignment]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, LorettaAdpConfig)
        family = FAMILIES.get(model_config.get("model_type", ""))
        if peft_config.target_modules is None and peft_config.use_adapterp and family:
            if not family.after:
                raise ValueError(
                    f"use_adapterp: the feed-forward blocks of {model_config['model_type']!r} have no linear at their "
                    f"exit; name target_modules"
                )
            peft_config.target_modules = set(family.after)
            peft_config.exclude_modules = _also_excluding(peft_config.exclude_modules, family.after_attention)
        return super()._prepare_adapter_config(peft_config, model_config)

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
        before = family.before if family else ()
        return "mh_adapter" if any(_ends_with(key, name) for name in before) else "output_adapter"

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_ERROR)


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


def _also_excluding(exclude_modules: Any, names: tuple[str, ...]) -> Any:
    if not names:
        return exclude_modules
    if isinstance(exclude_modules, str):
        own = "|".join(name.replace(".", r"\.") for name in names)
        return rf"(?:{exclude_modules})|(?:.*\.)?(?:{own})"
    return {*(exclude_modules or ()), *names}
