"""On which side of PEFT's hard-coded lists of methods LoRETTA belongs.

The helpers of PEFT's tests name config classes ("skip unless it is one of these"). A method that they do not name falls
on one side by default. Where that is the wrong side, `open_gates` and `stands_in_for_lora` move it; here is the whole
list, as "rep / adp: why", an asterisk where the default is changed:

- `_skip_if_merging_not_supported` (skips OSF, Lily, Shadow, prompts): merges / skipped*: an activation lies inside adp,
  no weight equals it, `merge_adapter` raises.
- `_skip_if_conv1d_not_supported` (runs IA3, LoHa, LoKr, LoRA): runs* / runs*: both wrap transformers' Conv1D.
- `_skip_if_not_conv1d_supported` (skips thirteen methods): runs / runs: the same.
- `check_beft_config` (meant for BEFT, but its `isinstance` on a class never holds, so it skips the merge tests on Llama
  and Gemma 3 and changes the targets on GPT-J for every method): without effect* / without effect*.
- `test_mixed_adapter_batches`, `test_generate_with_mixed_adapter_batches` (LoRA only): runs* / skipped: rep routes the
  samples of a batch by `adapter_names`, adp promises no such thing.
- `_test_adding_multiple_adapters_with_bias_raises` (expects LoRA, AdaLoRA, BOFT to raise): raises* / is only built: the
  second config of the test differs in `r`, which adp has not.
- `test_weighted_combination_of_adapters` (LoRA, IA3): skipped / skipped: the sum of two tensor trains is not one of the
  same rank, there is no `add_weighted_adapter`.
- `skip_deberta_lora_tests` (by parts of the class name): runs / runs: none of its parts is in our names.
- `set_init_weights_false` (an option per class, otherwise `init_weights=False`): the latter / the latter.
- `_test_merge_layers`, `_test_safe_merge`, `test_disable_adapters_with_merging` (wider tolerances for some methods):
  the narrow one / skipped.
- `test_only_params_are_updated`, `test_disable_adapters` (another learning rate for some methods): the default of each.
- `test_disable_adapter_with_bias_warns` (its condition holds always): skipped / skipped, as for every method.
- `test_lora_conversion` asks the layer whether it supports that, no list.
"""

from __future__ import annotations

from types import ModuleType

import pytest
from peft import BeftConfig

from loretta import LorettaAdpConfig, LorettaRepConfig

# Tests that go on only for `config_cls == LoraConfig`, and the method of ours that belongs with LoRA there.
_WITH_LORA = {
    "test_mixed_adapter_batches": LorettaRepConfig,
    "test_generate_with_mixed_adapter_batches": LorettaRepConfig,
    "test_adding_multiple_adapters_with_bias_raises": LorettaRepConfig,
}


def stands_in_for_lora(test_name: str, config_cls: type) -> bool:
    """Whether the test `test_name` shall take `config_cls` where it asks for `LoraConfig`."""
    return _WITH_LORA.get(test_name) is config_cls


def open_gates(module: ModuleType) -> None:
    """Replace, in the module of a test or of its helpers, the gates on whose wrong side LoRETTA falls."""
    for name, wrap in _WRAPPERS.items():
        if hasattr(module, name):
            setattr(module, name, wrap(getattr(module, name)))


def _merging(original):
    def skip_if_merging_not_supported(model_id, config_cls, config_kwargs):
        if config_cls is LorettaAdpConfig:
            pytest.skip("LoRETTA_adp has an activation inside and does not merge.")
        original(model_id, config_cls, config_kwargs)

    return skip_if_merging_not_supported


def _conv1d(original):
    def skip_if_conv1d_not_supported(model_id, config_cls, config_kwargs):
        if config_cls not in (LorettaAdpConfig, LorettaRepConfig):
            original(model_id, config_cls, config_kwargs)

    return skip_if_conv1d_not_supported


def _beft(original):
    def check_beft_config(config_cls, model_id, config_kwargs):
        if config_cls is BeftConfig:
            original(config_cls, model_id, config_kwargs)

    return check_beft_config


_WRAPPERS = {
    "_skip_if_merging_not_supported": _merging,
    "_skip_if_conv1d_not_supported": _conv1d,
    "check_beft_config": _beft,
}
