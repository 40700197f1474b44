from __future__ import annotations

from pathlib import Path

import pytest

from c3_hf.training.arguments import parse_recipe
from c3_hf.training.train import plan_lengths


REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "examples" / "recipes").rglob("*.yaml"))
TRAINING_RECIPES = [path for path in RECIPES if "accelerate" not in path.parts]


@pytest.mark.parametrize("path", TRAINING_RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path, tmp_path):
    # Whether a GPU is there is not the recipe's business, so the parts that ask for one are switched off.
    overrides = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    model_args, data_args, args = parse_recipe(path, overrides)
    # A model that is there already has its stride from its configuration.
    strides = (model_args.latent_stride, data_args.stride_ceiling, data_args.asking_stride_ceiling)
    num_latents = model_args.num_latents if any(value is not None for value in strides) else None
    batches, growth = plan_lengths(data_args, args, num_latents)
    assert len(batches) == args.max_steps * args.gradient_accumulation_steps
    assert (growth is None) == (data_args.growth_accuracy is None)
    assert args.max_steps > 0
    assert data_args.train_files
    assert (model_args.model_name_or_path is None) == (model_args.text_config is not None)


def test_overrides(write_recipe, recipe):
    overrides = ["--learning_rate", "2e-3", "--freeze", "[encoder]", "--token-noise", "0.25", "--bf16", "true"]
    model_args, data_args, args = parse_recipe(write_recipe(recipe), overrides)
    assert args.learning_rate == 2e-3
    assert model_args.freeze == ["encoder"]
    assert data_args.token_noise == 0.25
    assert args.bf16 is True


def test_words_that_yaml_takes_for_something_else(write_recipe, recipe):
    path = Path(write_recipe(recipe))
    with path.open("a", encoding="utf-8") as file:
        file.write("\nsave_strategy: no\n")
    *_, args = parse_recipe(path, ["--eval_strategy", "no", "--weight_decay", "1e-3", "--bf16", "no"])
    assert (args.save_strategy, args.eval_strategy, args.weight_decay, args.bf16) == ("no", "no", 1e-3, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, r"unknown fields: \['learning_rat'\]"),
        ({"freeze": ["decoders"]}, r"`freeze` may name .* got \['decoders'\]"),
        ({"freeze": ["encoder", "latent_queries", "projector", "decoder"]}, "nothing is left to train"),
        ({"lora": ["projector"]}, r"`lora` may name \['encoder', 'decoder'\], got \['projector'\]"),
        ({"text_config": None}, "Give `model_name_or_path` to train an existing model, or all of"),
        ({"model_name_or_path": "x"}, "must be left out: the checkpoint has its own"),
        ({"token_noise": 1.5}, "`token_noise` must lie between 0 and 1, got 1.5"),
        ({"long_share": -1}, "`long_share` must lie between 0 and 1, got -1"),
        ({"full_share": 2}, "`full_share` must lie between 0 and 1, got 2"),
        ({"decoder_lr_ratio": 0}, "`decoder_lr_ratio` must be positive, got 0"),
        ({"distillation_weight": -1}, "`distillation_weight` must not be negative, got -1"),
        ({"readout_weight": -1}, "`readout_weight` must not be negative, got -1"),
        ({"readout_candidates": 0}, "`readout_candidates` must be positive, got 0"),
        ({"decoder_start": 5}, "`decoder_start` is 5, and without a read-out nothing teaches the encoder before"),
        ({"attention_bias_range": {"heads": 1.0}}, "`attention_bias_range` may name .*, got .'heads'."),
        ({"trained_dtype": "float16"}, "`trained_dtype` must be float32 or bfloat16, got 'float16'"),
        ({"max_steps": -1}, "`max_steps` must be positive, got -1"),
    ],
)
def test_bad_fields(write_recipe, recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(write_recipe({**recipe, **changes}))


def test_bad_files(write_recipe, tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a YAML mapping, got list"):
        parse_recipe(path)
    with pytest.raises(ValueError, match="must come as `--name value` pairs"):
        parse_recipe(write_recipe({}), ["--seed"])
    with pytest.raises(ValueError, match="must come as `--name value` pairs"):
        parse_recipe(write_recipe({}), ["seed", "1"])
