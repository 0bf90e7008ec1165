"""Several adapters in one batch: the base runs once a layer, and each row is what its adapter alone makes of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.block import LorettaAdpBlock
from loretta.layer import LorettaLayer
from tests.tiny_models import tiny_model

ALL = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
# Name: family, config class, fields.
CASES = {
    "adp-by-family": ("llama", LorettaAdpConfig, {}),
    "adp-on-inputs": ("llama", LorettaAdpConfig, {"target_modules": ALL, "adapter_type": "mh_adapter"}),
    "adp-on-outputs": ("llama", LorettaAdpConfig, {"target_modules": ALL, "adapter_type": "output_adapter"}),
    "adp-beside": ("llama", LorettaAdpConfig, {"target_modules": ALL, "use_parallel_adapter": True}),
    "adp-dense": ("llama", LorettaAdpConfig, {"tensorized": False}),
    "adp-at-blocks": ("mixtral", LorettaAdpConfig, {}),
    "adp-into-blocks": ("mixtral", LorettaAdpConfig, {"adapter_type": "mh_adapter"}),
    "adp-at-blocks-that-flatten-the-batch": ("llama4_text", LorettaAdpConfig, {}),
    "rep": ("llama", LorettaRepConfig, {"target_modules": ALL}),
    "rep-slices-of-conv1d": ("gpt2", LorettaRepConfig, {"enable_lora": [True, False, True]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_runs_once_a_layer_and_each_row_gets_its_adapter(case: str) -> None:
    family, config_class, fields = CASES[case]
    config = config_class(task_type="CAUSAL_LM", init_weights=False, train_layernorm=False, **fields)
    model = get_peft_model(tiny_model(family), config, adapter_name="w")
    for name in "xyz":
        model.add_adapter(name, config)
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, LorettaLayer)]
    calls: Counter[int] = Counter()
    for layer in layers:
        layer.base_layer.register_forward_pre_hook(lambda base, args: calls.update([id(base)]))

    ids = torch.randint(3, 60, (7, 5))
    names = ["z", "__base__", "w", "y", "w", "x", "z"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        assert sorted(calls.values()) == [1] * len(layers)
        alone = {}
        for name in "wxyz":
            model.set_adapter(name)
            alone[name] = model(input_ids=ids).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=ids).logits
    for row, name in enumerate(names):
        # to the last bits: a matrix product may round differently for another number of rows
        torch.testing.assert_close(mixed[row], alone[name][row], msg=lambda text, at=(row, name): f"{at}: {text}")
    assert len({tuple(alone[name].flatten().tolist()) for name in alone}) == len(alone)
    assert any(isinstance(layer, LorettaAdpBlock) for layer in layers) == ("block" in case)


def test_an_adapter_that_a_layer_lacks_leaves_its_rows_to_the_base() -> None:
    fields = {"task_type": "CAUSAL_LM", "init_weights": False, "train_layernorm": False}
    model = get_peft_model(tiny_model("llama"), LorettaRepConfig(target_modules=["q_proj"], **fields), "q").eval()
    model.add_adapter("v", LorettaRepConfig(target_modules=["v_proj"], **fields))
    x = torch.randn(2, 3, 32)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        mixed = layer(x, adapter_names=["q", "v"])
    assert torch.equal(mixed[1], layer.base_layer(x)[1])
    assert not torch.equal(mixed[0], layer.base_layer(x)[0])


def test_a_mixed_batch_under_autocast_equals_one_adapter_at_a_time() -> None:
    config = LorettaAdpConfig(task_type="CAUSAL_LM", init_weights=False, train_layernorm=False)
    model = get_peft_model(tiny_model("llama"), config, adapter_name="x").eval()
    model.add_adapter("y", config)
    ids = torch.randint(3, 60, (2, 5))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids=ids, adapter_names=["y", "x"]).logits
        for row, name in enumerate("yx"):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(input_ids=ids).logits[row])
