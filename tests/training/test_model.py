from __future__ import annotations

import sys

import pytest
import torch

import factories
from c3_hf import C3ForConditionalGeneration
from c3_hf.training.arguments import parse_recipe
from c3_hf.training.model import add_lora, prepare_model, share_initial_embeddings


def test_a_new_model_stops_where_replies_end(write_recipe, recipe):
    model, processor = prepare_model(parse_recipe(write_recipe(recipe))[0])
    assert model.generation_config.eos_token_id == [258, 256]
    assert model.generation_config.pad_token_id == 256
    assert model.generation_config.do_sample is False
    assert processor.num_latents == model.config.num_latents == 4
    assert model.config.context_token_id == processor.tokenizer.convert_tokens_to_ids("<imgpad>")


def test_halves_of_different_widths_share_the_common_columns(write_recipe, recipe):
    model, _ = prepare_model(parse_recipe(write_recipe({**recipe, "share_initial_embeddings": True}))[0])
    encoder, decoder = model.model.encoder.embed_tokens.weight, model.get_input_embeddings().weight
    assert encoder.shape[1] == 24
    assert torch.equal(encoder, decoder[:, :24])
    assert decoder.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_two_vocabularies_cannot_share():
    config = factories.make_config(
        encoder_config=factories.sub_config(vocab_size=300), inline_context_start_token_id=None,
        inline_context_end_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`share_initial_embeddings` needs one vocabulary, got 300 words"):
        share_initial_embeddings(C3ForConditionalGeneration(config))


def test_heads_begin_with_distances_of_their_own(write_recipe, recipe):
    recipe["attention_bias_range"] = {"encoder": 3.0}
    model, _ = prepare_model(parse_recipe(write_recipe(recipe))[0])
    biases = {
        half: torch.cat(
            [p.flatten() for name, p in part.named_parameters() if name.endswith(("q_proj.bias", "k_proj.bias"))]
        )
        for half, part in (("encoder", model.model.encoder), ("decoder", model.model.language_model))
    }
    assert biases["encoder"].std().item() == pytest.approx(3, abs=0.5)
    assert biases["decoder"].abs().max() == 0


def test_a_half_without_biases_cannot_begin_so(write_recipe, recipe):
    recipe["attention_bias_range"] = {"decoder": 3.0}
    recipe["text_config"] = {**recipe["text_config"], "model_type": "llama"}
    with pytest.raises(ValueError, match="`attention_bias_range` was given for a half without biases"):
        prepare_model(parse_recipe(write_recipe(recipe))[0])


def test_the_attention_asked_for(write_recipe, recipe):
    model, _ = prepare_model(parse_recipe(write_recipe({**recipe, "attn_implementation": "eager"}))[0])
    assert model.model.encoder.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"


def test_frozen_modules_keep_their_weights_and_the_others_train(write_recipe, recipe):
    frozen = ["model.encoder.embed_tokens", "model.language_model.layers.1.mlp"]
    model, _ = prepare_model(parse_recipe(write_recipe({**recipe, "freeze_modules": frozen}))[0])
    stopped = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert stopped == {name for name, _ in model.named_parameters() if name.startswith(tuple(frozen))}
    with pytest.raises(ValueError, match=r"`freeze_modules` names \['encoder.wte'\], which the model does not have"):
        prepare_model(parse_recipe(write_recipe({**recipe, "freeze_modules": ["encoder.wte"]}))[0])


def test_a_new_model_is_not_built_in_parts(write_recipe, recipe, monkeypatch):
    monkeypatch.setattr("c3_hf.training.model.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="`model_name_or_path` must name a checkpoint under DeepSpeed ZeRO-3"):
        prepare_model(parse_recipe(write_recipe(recipe))[0])


def test_lora_without_peft_says_how_to_get_it(write_recipe, recipe, monkeypatch):
    arguments = parse_recipe(write_recipe({**recipe, "lora": ["decoder"]}))[0]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ImportError, match=r"`lora` needs peft. In a clone of the repository: pip install \"\.\[train\]\""
    ):
        add_lora(factories.make_model(), arguments)
