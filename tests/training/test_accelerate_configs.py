"""The accelerate configurations beside the recipes: every field is one that `accelerate launch` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


pytest.importorskip("accelerate", reason="accelerate comes with the extra `train`")
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


FOLDER = Path(__file__).parents[2] / "examples" / "recipes" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def launch_arguments(path):
    """The arguments of `accelerate launch` with the nested fields of a configuration given as options."""
    config = load_config_from_file(str(path))
    words = []
    for prefix, fields in (("", config.deepspeed_config), ("fsdp_", config.fsdp_config)):
        for name, value in fields.items():
            words += [f"--{prefix}{name.removeprefix(prefix)}", str(value)]
    arguments = launch_command_parser().parse_args([*words, "run.py"])
    # As the launcher itself completes them.
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    arguments.num_processes, arguments.num_machines = config.num_processes, config.num_machines
    arguments.mixed_precision, arguments.main_process_port = config.mixed_precision, 0
    arguments.use_fsdp, arguments.dynamo_backend = bool(config.fsdp_config), "no"
    return arguments, words


def set_environment(environment, monkeypatch):
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)


def test_there_is_one_for_every_engine():
    assert [path.stem for path in CONFIGS] == ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_field_and_takes_its_value(path):
    # Unknown names at the top are refused here; accelerate itself passes over nested ones in silence.
    arguments, words = launch_arguments(path)
    assert arguments.training_script == "run.py"
    assert all(str(getattr(arguments, name[2:])) == value for name, value in zip(words[::2], words[1::2]))


@pytest.mark.parametrize(("name", "value"), [("zero3_save_model", True), ("zero_stage", "three")])
def test_a_wrong_field_does_not_pass(tmp_path, name, value):
    values = yaml.safe_load((FOLDER / "deepspeed_zero3.yaml").read_text())
    values["deepspeed_config"][name] = value
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises((SystemExit, AssertionError)):
        test_accelerate_knows_every_field_and_takes_its_value(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_shards_and_saves_as_said(stage, monkeypatch):
    path = FOLDER / f"deepspeed_zero{stage}.yaml"
    assert load_config_from_file(str(path)).distributed_type == "DEEPSPEED"
    set_environment(prepare_deepspeed_cmd_env(launch_arguments(path)[0])[1], monkeypatch)
    plugin = DeepSpeedPlugin()
    sharding = plugin.deepspeed_config["zero_optimization"]
    assert sharding["stage"] == stage
    # Without it, a model saved from stage 3 holds this process's share of the weights only.
    assert sharding["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    # Left to transformers, which fills in what the recipe says.
    assert plugin.gradient_accumulation_steps == plugin.gradient_clipping == "auto"


def test_fsdp2_wraps_the_layers_of_both_halves(monkeypatch):
    path = FOLDER / "fsdp2.yaml"
    assert load_config_from_file(str(path)).distributed_type == "FSDP"
    set_environment(prepare_multi_gpu_env(launch_arguments(path)[0]), monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.transformer_cls_names_to_wrap == ["Qwen2DecoderLayer"]
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
