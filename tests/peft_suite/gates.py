"""On which side of PEFT's hard-coded lists of methods LoRETTA belongs.

The helpers of PEFT's tests name config classes ("skip unless it is one of these"). A method that they do not name falls
on one side by default. Where that is the wrong side, `open_gates`, `stands_in_for` and `skip_reason` move it; here is
the whole list, as "rep / adp: why", an asterisk where the default is changed:

- `_skip_if_merging_not_supported` (skips OSF, Lily, Shadow, prompts): merges / skipped* but for the row with
  non_linearity="identity": another activation inside adp is no linear map, no weight equals it, `merge_adapter` raises.
- `_skip_if_conv1d_not_supported` (runs IA3, LoHa, LoKr, LoRA): runs* / runs*: both wrap transformers' Conv1D.
- `_skip_if_not_conv1d_supported` (skips thirteen methods): runs / runs: the same.
- `check_beft_config` (meant for BEFT, but its `isinstance` on a class never holds, so it skips the merge tests on Llama
  and Gemma 3 and changes the targets on GPT-J for every method): without effect* / without effect*.
- `test_mixed_adapter_batches` (LoRA only): runs* / runs*: both route the samples of a batch by `adapter_names`. Not adp
  on OPT, which flattens batch and sequence before fc1; PEFT's LoRA on fc1 refuses the same way.
- `test_generate_with_mixed_adapter_batches` (LoRA only): runs* / skipped: the test multiplies every parameter by ten to
  make the adapters stronger, hence a train of d cores by 10^d, and the square in RMSNorm overflows.
- `test_mixed_adapter_batches_merged_raises` (methods that mix batches): runs / skipped*: adp does not merge.
- `_test_adding_multiple_adapters_with_bias_raises` (expects LoRA, AdaLoRA, BOFT to raise): raises* / is only built: the
  second config of the test differs in `r`, which adp has not.
- `test_weighted_combination_of_adapters` (LoRA, IA3): skipped / skipped: the sum of two tensor trains is not one of the
  same rank, there is no `add_weighted_adapter`.
- `skip_deberta_lora_tests` (by parts of the class name): runs / runs: none of its parts is in our names.
- `set_init_weights_false` (an option per class, otherwise `init_weights=False`): the latter / the latter.
- `_test_merge_layers`, `_test_safe_merge`, `test_disable_adapters_with_merging` (wider tolerances for some methods):
  the narrow one / skipped.
- `test_only_params_are_updated`, `test_parameters_after_loading_model` (learning rate 0.5, or one of its own for eleven
  methods), `test_disable_adapters` (0.01, or one of its own): 0.001* / 0.01* on the MLPs, where three steps down a loss
  without lower bound give NaN in every parameter, which the first test takes for an update; the default / 5* on the
  model of embeddings. `learning_rate` gives it, and the steps are checked to be finite.
- `test_disable_adapter_with_bias_warns` (its condition holds always): skipped / skipped, as for every method.
- `test_lora_conversion` (asks the layer): runs / ends at once. On OPT it reads the resolved `target_modules` back from
  the caller's config, which LoRETTA does not write to: there `edit_row` names the default targets.
"""

from __future__ import annotations

from types import ModuleType

import pytest
from peft import BeftConfig

from loretta import LorettaAdpConfig, LorettaRepConfig

OURS = (LorettaRepConfig, LorettaAdpConfig)

# Tests that ask for a config class by name, and the methods of ours that they shall take for it.
_STAND_INS: dict[str, tuple[str, tuple[type, ...]]] = {
    "test_mixed_adapter_batches": ("LoraConfig", OURS),
    "test_generate_with_mixed_adapter_batches": ("LoraConfig", (LorettaRepConfig,)),
    "test_adding_multiple_adapters_with_bias_raises": ("LoraConfig", (LorettaRepConfig,)),
}
_OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
# (test, method, model or None for all) -> why it is skipped
_SKIPPED: dict[tuple[str, type, str | None], str] = {
    ("test_mixed_adapter_batches_merged_raises", LorettaAdpConfig, None): "LoRETTA_adp does not merge.",
    (
        "test_mixed_adapter_batches",
        LorettaAdpConfig,
        _OPT,
    ): "OPT flattens the batch before the layers that adp targets.",
}
_TRAINING = ("test_only_params_are_updated", "test_parameters_after_loading_model", "test_disable_adapters")
# (method, model) -> learning rate in these tests; plain SGD moves a core by the square of its gain
_LEARNING_RATES: dict[tuple[type, str], float] = {
    (LorettaRepConfig, "MLP"): 0.001,
    (LorettaRepConfig, "MLP2"): 0.001,
    (LorettaAdpConfig, "MLP"): 0.01,
    (LorettaAdpConfig, "MLP2"): 0.01,
    (LorettaAdpConfig, "EmbConv1D"): 5.0,
}
# (test, method, model) -> options added to the row
_ROW_EDITS: dict[tuple[str, type, str | None], dict] = {
    ("test_lora_conversion", LorettaRepConfig, _OPT): {"target_modules": ["q_proj", "v_proj"]}
}


def skip_reason(test_name: str, config_cls: type, model_id: str | None) -> str | None:
    """Why the test is not run for this method and model, if so."""
    return next(
        (why for key, why in _SKIPPED.items() if key[:2] == (test_name, config_cls) and key[2] in (None, model_id)),
        None,
    )


def learning_rate(test_name: str, config_cls: type | None, model_id: str | None) -> float | None:
    """The learning rate that the test shall use for one of our methods, None for the test's own."""
    if test_name not in _TRAINING or config_cls is None:
        return None
    return _LEARNING_RATES.get((config_cls, model_id or ""))


def edit_row(test_name: str, config_cls: type, params: dict) -> None:
    """Add to the options in a test's parameters what the test needs to find there."""
    if edit := _ROW_EDITS.get((test_name, config_cls, params.get("model_id"))):
        params["config_kwargs"] = params["config_kwargs"] | edit


def stands_in_for(test_name: str, config_cls: type | None) -> str | None:
    """The name of the config class in whose place the test `test_name` shall find `config_cls`, if any."""
    name, classes = _STAND_INS.get(test_name, (None, ()))
    return name if config_cls in classes else None


def open_gates(module: ModuleType) -> None:
    """Replace, in the module of a test or of its helpers, the gates on whose wrong side LoRETTA falls."""
    for name, wrap in _WRAPPERS.items():
        if hasattr(module, name):
            setattr(module, name, wrap(getattr(module, name)))


def _merging(original):
    def skip_if_merging_not_supported(model_id, config_cls, config_kwargs):
        if config_cls is LorettaAdpConfig and config_kwargs.get("non_linearity") != "identity":
            pytest.skip("LoRETTA_adp has an activation inside and does not merge.")
        original(model_id, config_cls, config_kwargs)

    return skip_if_merging_not_supported


def _conv1d(original):
    def skip_if_conv1d_not_supported(model_id, config_cls, config_kwargs):
        if config_cls not in OURS:
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
