"""The ready configurations: accelerate reads each one, and asks the processes for what its first line says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from loretta.cli import distributed

CONFIGS = Path(__file__).parents[2] / "configs"


def environment(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables that `accelerate launch` gives its processes, set in this one."""
    monkeypatch.chdir(CONFIGS.parent)
    started: list[argparse.Namespace] = []
    monkeypatch.setattr(launch, "multi_gpu_launcher", started.append)
    monkeypatch.setattr(launch, "deepspeed_launcher", started.append)
    words = ["--config_file", str(CONFIGS / name), "-m", "loretta", "finetune", "--method", "rep", "--r", "4"]
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    (arguments,) = started
    assert arguments.num_processes == 2
    assert arguments.training_script_args[-2:] == ["--r", "4"]
    if arguments.use_deepspeed:
        _, variables = prepare_deepspeed_cmd_env(arguments)
    else:
        variables = prepare_multi_gpu_env(arguments)
    changed = {name: value for name, value in variables.items() if "ACCELERATE" in name or "FSDP" in name}
    for variable, value in changed.items():
        monkeypatch.setenv(variable, value)
    return changed


def test_ddp(monkeypatch) -> None:
    environment("ddp.yaml", monkeypatch)
    assert distributed.engine() == "none"


def test_fsdp2(monkeypatch) -> None:
    environment("fsdp2.yaml", monkeypatch)
    assert distributed.engine() == "fsdp"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading
    assert "SHARDED" in str(plugin.state_dict_type)


def test_zero3(monkeypatch) -> None:
    variables = environment("zero3.yaml", monkeypatch)
    assert distributed.engine() == "deepspeed"
    file = CONFIGS.parent / variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    config = HfDeepSpeedConfig(json.loads(file.read_text()))
    assert config.is_zero3()
    assert config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    assert variables["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
