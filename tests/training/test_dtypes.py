"""What trains moves: in float32, whatever the checkpoint holds, with LoRA or without, at both ends of transformers."""

from __future__ import annotations

import pytest
import torch

import factories
from c3_hf import C3ForConditionalGeneration
from c3_hf.training.arguments import parse_recipe
from c3_hf.training.model import prepare_model
from c3_hf.training.train import train


# transformers 5 has a new name for this property, which peft does not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 264}


def save_checkpoint(folder, dtype=torch.bfloat16, **changes):
    factories.make_model(**changes).to(dtype).save_pretrained(folder)
    factories.make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tune(write_recipe, recipe, tmp_path):
    """Train a checkpoint of bfloat16 weights; returns its tensors and the saved ones."""

    def go(checkpoint=None, **changes):
        checkpoint = checkpoint or save_checkpoint(tmp_path / "checkpoint")
        new_model = dict.fromkeys(("tokenizer_path", "text_config", "encoder_config"))
        values = {**recipe, **new_model, "model_name_or_path": checkpoint, "save_strategy": "no", **changes}
        trainer = train(*parse_recipe(write_recipe(values)))
        before = C3ForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
        after = C3ForConditionalGeneration.from_pretrained(trainer.args.output_dir, dtype="auto")
        return before.state_dict(), after.state_dict()

    return go


def moved(before, after, name):
    """Share of a tensor's elements that are no longer what they were."""
    return float((before[name].float() != after[name].float()).float().mean())


# `bf16` computes in bfloat16 and changes nothing of what is kept.
@pytest.mark.parametrize("bf16", [False, True])
def test_a_small_learning_rate_moves_a_bfloat16_checkpoint(tune, bf16):
    before, after = tune(learning_rate=1e-5, max_steps=2, bf16=bf16, lr_scheduler_type="constant")
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    # Rows of words that no text holds stand still in the encoder's table.
    names = [name for name in before if name.endswith("proj.weight") or "norm" in name]
    assert len(names) > 28
    still = {name: moved(before, after, name) for name in names if moved(before, after, name) < 0.9}
    assert still == {}


def test_bfloat16_parameters_have_to_be_asked_for(tune, caplog):
    with caplog.at_level("WARNING"):
        before, after = tune(learning_rate=1e-5, max_steps=2, trained_dtype="bfloat16")
    assert "`trained_dtype` is bfloat16: updates below 1/512 of a weight are lost" in caplog.text
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert moved(before, after, name) < 0.1


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_beside_lora_only_what_does_not_train_keeps_its_dtype(write_recipe, recipe, tmp_path, mixed_precision):
    changes = {
        **dict.fromkeys(("tokenizer_path", "text_config", "encoder_config")),
        "model_name_or_path": save_checkpoint(tmp_path / "checkpoint"),
        "lora": ["encoder", "decoder"],
    }
    model, _ = prepare_model(parse_recipe(write_recipe({**recipe, **changes}))[0], mixed_precision)
    dtypes = {trains: set() for trains in (False, True)}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16 if mixed_precision else torch.float32}}
    names = "\n".join(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert all(part in names for part in ("latent_queries", "projector", "encoder", "language_model"))


@pytest.mark.parametrize("bf16", [False, True])
def test_merged_weights_have_the_dtype_of_the_checkpoint(tune, bf16):
    before, after = tune(lora=["encoder", "decoder"], learning_rate=1e-2, bf16=bf16)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert after.keys() == before.keys()
    for name in ("model.latent_queries.weight", "model.projector.weight", "model.encoder.layers.1.mlp.up_proj.weight"):
        assert moved(before, after, name) > 0.5, name
    assert moved(before, after, "model.language_model.embed_tokens.weight") == 0


@pytest.mark.parametrize("halves", [(GPT2, GPT2), (GPT2, factories.sub_config())], ids=["gpt2", "gpt2-qwen2"])
def test_lora_finds_the_layers_of_any_family(tune, tmp_path, halves):
    encoder, decoder = halves
    checkpoint = save_checkpoint(tmp_path / "gpt2", torch.float32, encoder_config=encoder, text_config=decoder)
    before, after = tune(checkpoint, lora=["encoder", "decoder"], learning_rate=1e-2)
    still = [
        name
        for name in before
        if (".h." in name or ".layers." in name) and before[name].dim() == 2 and moved(before, after, name) < 0.9
    ]
    assert still == []
    for name in ("model.encoder.wte.weight", "model.encoder.h.0.ln_1.weight"):
        assert moved(before, after, name) == 0


def test_a_merged_model_has_no_heads_of_the_read_out(tune, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "strided", torch.float32, latent_stride=8)
    before, after = tune(checkpoint, lora=["encoder"], readout_weight=1.0, learning_rate=1e-2)
    assert after.keys() == before.keys()
    assert moved(before, after, "model.encoder.layers.0.mlp.up_proj.weight") > 0.5
