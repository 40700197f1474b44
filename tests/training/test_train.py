from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

import c3_hf
from c3_hf import C3ForConditionalGeneration
from c3_hf.training.arguments import PARTS, parse_recipe
from c3_hf.training.model import compile_layers, prepare_model
from c3_hf.training.train import main, train
from c3_hf.training.trainer import STAGING_FOLDER, complete_checkpoints, publish_checkpoint


@pytest.fixture
def run(write_recipe, recipe):
    """Train with changes to the recipe; returns the trainer."""

    def go(**changes):
        return train(*parse_recipe(write_recipe({**recipe, **changes})))

    return go


def weights(path_or_model):
    model = path_or_model
    if isinstance(model, (str, Path)):
        model = C3ForConditionalGeneration.from_pretrained(model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def read_log(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_all_it_promises(run, text_path):
    trainer = run(eval_files=[str(text_path)], eval_ratios=[2], eval_strategy="steps", eval_steps=4, eval_items=2)
    folder = Path(trainer.args.output_dir)
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert not list((folder / STAGING_FOLDER).iterdir())
    log = read_log(trainer)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert all(entry["tokens_per_second"] > 0 for entry in log if "loss" in entry)
    assert sum(entry.get("outcome_examples", 0) for entry in log) == 16
    (evaluation,) = [entry for entry in log if "eval_text_2x_token_accuracy" in entry]
    assert 0 <= evaluation["eval_text_2x_char_precision"] <= 1
    (record,) = json.loads((folder / "data.json").read_text())
    assert (record["name"], record["bytes"]) == (text_path.name, text_path.stat().st_size)
    for place in (folder, folder / "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(place)
        processor = AutoProcessor.from_pretrained(place)
        assert_same(weights(model), weights(trainer.model))
        inputs = processor.apply_chat_template(processor.restore_messages("It was"))
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_resuming_equals_never_stopping(run, tmp_path):
    # The ceiling waits for the model while training, so where it waited has to come back too.
    growing = {"growth_accuracy": 0.02, "context_ceiling": [[0, 8], [40, 48]]}
    changes = {"max_steps": 14, "save_steps": 12, "output_dir": str(tmp_path / "run"), **growing}
    whole = run(**changes)
    losses = {entry["step"]: entry["loss"] for entry in read_log(whole) if "loss" in entry}
    assert 8 < read_log(whole)[-2]["ceiling"] < 20
    shutil.rmtree(tmp_path / "run" / "checkpoint-14")
    resumed = run(**changes)
    assert resumed.state.global_step == 14
    assert_same(weights(whole.model), weights(resumed.model), rtol=0, atol=0)
    again = [entry for entry in read_log(resumed) if "loss" in entry][len(losses) :]
    assert [(entry["step"], entry["loss"]) for entry in again] == [(step, losses[step]) for step in (13, 14)]


def test_accumulated_batches_equal_one_batch(run, tmp_path):
    # Adam divides by the size of a gradient, and makes much of rounding where it is next to nothing; so do many or
    # long steps, each of which starts from the rounding of those before.
    plain = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "save_strategy": "no"}
    whole = run(per_device_train_batch_size=8, output_dir=str(tmp_path / "whole"), **plain)
    parts = run(
        per_device_train_batch_size=1, gradient_accumulation_steps=8, output_dir=str(tmp_path / "parts"), **plain
    )
    losses = [[entry["loss"] for entry in read_log(trainer) if "loss" in entry] for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(weights(whole.model), weights(parts.model), rtol=1e-3, atol=2e-5)


def test_streaming_trains(run):
    trainer = run(streaming=True, max_steps=3)
    assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match="`batch_tokens` is 64, but with `streaming` batches have a fixed size"):
        run(streaming=True, batch_tokens=64, resume=False)


def test_batches_by_tokens_train(run):
    log = read_log(run(batch_tokens=256, max_batch_size=6))
    assert {entry["outcome_examples"] for entry in log if "loss" in entry} <= set(range(1, 7))


@pytest.mark.parametrize("parts", [["encoder"], ["decoder"], ["latent_queries", "projector"]])
def test_frozen_parts_keep_their_weights(run, write_recipe, recipe, parts):
    torch.manual_seed(1)
    trainer = run(freeze=parts, max_steps=2)
    before = weights(prepare_model(parse_recipe(write_recipe(recipe))[0])[0])
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    frozen = {name for name in before if any(name.startswith(PARTS[part]) for part in parts)}
    assert trained
    assert not trained & frozen
    assert {name for name in before if name != "lm_head.weight"} - trained == frozen - {"lm_head.weight"}


def test_the_decoder_learns_at_its_own_rate(run):
    trainer = run(decoder_lr_ratio=0.1, max_steps=2, lr_scheduler_type="constant")
    rates = {}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
    assert len(rates) == len(names)
    for name, rate in rates.items():
        assert rate == pytest.approx(3e-4 if name.startswith(PARTS["decoder"]) else 3e-3)


# transformers 5 has a new name for gradient checkpointing, which 4.57 and peft do not know yet.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_is_merged_and_saved(run, tmp_path):
    base = run(output_dir=str(tmp_path / "base"), max_steps=1)
    half_names = {"tokenizer_path": None, "text_config": None, "encoder_config": None}
    tuned = run(
        **half_names,
        model_name_or_path=str(tmp_path / "base"),
        lora=["encoder", "decoder"],
        freeze=["latent_queries"],
        output_dir=str(tmp_path / "lora"),
        max_steps=3,
    )
    before, after = weights(base.model), weights(tmp_path / "lora")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.projector.weight", "model.encoder.layers.0.self_attn.q_proj.weight"} <= changed
    assert "model.language_model.layers.1.mlp.down_proj.weight" in changed
    assert "model.latent_queries.weight" not in changed
    assert "model.language_model.embed_tokens.weight" not in changed
    assert sum(entry["loss"] for entry in read_log(tuned) if "loss" in entry) > 0


def test_distillation_pulls_towards_the_decoder_reading_the_text(run, recipe, tmp_path):
    # Weights large enough for the decoder to say something, and something else, with the text before it.
    decoder = {"text_config": {**recipe["text_config"], "initializer_range": 0.3}, "max_steps": 3}
    plain = run(**decoder, output_dir=str(tmp_path / "plain"))
    distilled = run(**decoder, output_dir=str(tmp_path / "distilled"), distillation_weight=1.0)
    first, second = ([entry["loss"] for entry in read_log(t) if "loss" in entry] for t in (plain, distilled))
    assert second[0] > first[0]
    assert not torch.equal(plain.model.lm_head.weight, distilled.model.lm_head.weight)


# Either name is taken with every transformers, and no warning is left over.
@pytest.mark.parametrize(
    "name", ["activation_checkpointing", pytest.param("gradient_checkpointing", marks=pytest.mark.slow)]
)
def test_checkpointing_of_activations_changes_nothing(run, tmp_path, name):
    plain = run(output_dir=str(tmp_path / "plain"))
    checkpointed = run(output_dir=str(tmp_path / "checkpointed"), **{name: True})
    for half in (checkpointed.model.model.encoder, checkpointed.model.model.language_model):
        assert half.layers[0].gradient_checkpointing
        assert half.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    assert_same(weights(plain.model), weights(checkpointed.model), rtol=1e-4, atol=1e-6)


def test_bfloat16_autocast_on_a_cpu(run):
    trainer = run(bf16=True, max_steps=1)
    seen = []
    layer = trainer.model.model.encoder.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model_wrapped, batch)
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_noise_from_the_command_line(write_recipe, recipe):
    main([write_recipe(recipe), "--token_noise", "0.5", "--max_steps", "1"])
    with pytest.raises(SystemExit, match="usage"):
        main([])


# torch's compiler keeps this warning of its own from being shown, but not from being raised as an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(run, tmp_path):
    plain = run(output_dir=str(tmp_path / "plain"))
    compiled = run(output_dir=str(tmp_path / "compiled"), compile_layers=True)
    losses = [[entry["loss"] for entry in read_log(trainer) if "loss" in entry] for trainer in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_compiling_covers_the_layers_of_both_halves(write_recipe, recipe):
    model, _ = prepare_model(parse_recipe(write_recipe(recipe))[0])
    names = set(model.state_dict())
    compile_layers(model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert len(compiled) == 4
    assert set(model.state_dict()) == names


def test_checkpoints_are_whole_or_not_there(tmp_path):
    for step in (2, 10, 9):
        staged = tmp_path / STAGING_FOLDER / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        (staged / "weights").write_text(str(step))
        publish_checkpoint(tmp_path, staged.name, keep=None)
    (tmp_path / STAGING_FOLDER / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    again = tmp_path / STAGING_FOLDER / "checkpoint-10"
    again.mkdir()
    (again / "weights").write_text("new")
    publish_checkpoint(tmp_path, "checkpoint-10", keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert (tmp_path / "checkpoint-10" / "weights").read_text() == "new"


def test_a_held_out_file_that_is_too_short_or_absent(run, text_path, tmp_path):
    with pytest.raises(ValueError, match=r"`eval_files`: 'text' has no text of 4000 tokens \(ratio 1000\)"):
        run(eval_files=[str(text_path)], eval_ratios=[1000])
    with pytest.raises(ValueError, match="`eval_files` entries are existing files"):
        run(eval_files=[str(tmp_path / "absent.jsonl")])
    assert Path(c3_hf.tiny_model_path()).parent.name == "checkpoints"
