"""Lengths: what does not fit is refused or said before the work, and `max_length` counts what it says it counts."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging

from c3_hf.modeling.generation_c3 import CACHE_NAME
from factories import VOCAB_SIZE, make_model, sub_config


def gpt2(positions, width=32):
    return {"model_type": "gpt2", "n_embd": width, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB_SIZE,
            "n_positions": positions, "bos_token_id": 256, "eos_token_id": 256}  # fmt: skip


@pytest.fixture(scope="module")
def short():
    """Tables of positions: 40 in the encoder, 60 in the decoder. It stops at nothing."""
    model = make_model(encoder_config=gpt2(40, 24), text_config=gpt2(60), segment_length=20)
    model.generation_config.eos_token_id = None
    model.generation_config.max_new_tokens = 500
    return model


def block(model):
    config = model.config
    return [config.context_start_token_id, *[config.context_token_id] * 4, config.context_end_token_id]


def forward(model, length):
    """A prompt of one context that takes so many positions."""
    head = block(model)
    stride = model.config.latent_stride or 1
    ids = torch.tensor([[*head, *[1] * (length - len(head) - 4 * (stride - 1))]])
    return model(ids, context_input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape


def generate(model, length):
    ids = torch.tensor([[*block(model), 1]])
    taken = 7 + 4 * ((model.config.latent_stride or 1) - 1)
    options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 256, "max_new_tokens": length - taken + 1}
    return model.generate(ids, context_input_ids=torch.ones(1, 3, dtype=torch.long), **options).shape


def one_more(model, length):
    """A step on a kept cache."""
    cache = getattr(model(torch.ones(1, length - 1, dtype=torch.long), use_cache=True), CACHE_NAME)
    return model(torch.tensor([[1]]), **{CACHE_NAME: cache}).logits.shape


BEYOND = {
    "forward": forward,
    "forward with a stride": forward,
    "generate": generate,
    "generate with a stride": generate,
    "a kept cache": one_more,
}


class TestContexts:
    def test_a_context_longer_than_a_segment_is_said(self, short, caplog):
        ids, context = torch.tensor([[*block(short), 2]]), torch.ones(1, 21, dtype=torch.long)
        for call in (lambda **inputs: short(**inputs), lambda **inputs: short.generate(**inputs, max_new_tokens=1)):
            caplog.clear()
            with caplog.at_level("WARNING"):
                call(input_ids=ids, context_input_ids=context[:, :20])
            assert "expect the rest to be lost" not in caplog.text
        with caplog.at_level("WARNING"):
            short.generate(ids, context_input_ids=context, max_new_tokens=1)
        message = "has a context of 21 tokens, and this model restores 20 (`config.segment_length`)"
        assert message in caplog.text
        assert "Cut the text into segments, as c3_hf.compress does." in caplog.text

    def test_20_tokens_a_latent_where_nothing_is_set(self):
        assert make_model().config.longest_segment == 80

    def test_more_than_the_encoder_has_positions_for(self, short):
        ids = torch.tensor([[*block(short), 2]])
        fits, too_long = torch.ones(1, 35, dtype=torch.long), torch.ones(1, 36, dtype=torch.long)
        short(ids, context_input_ids=fits)
        message = (
            "has 36 tokens: with the marker and 4 latent queries it takes 41 positions, more than the 40 positions"
        )
        for call in (short, short.generate):
            with pytest.raises(ValueError, match=message):
                call(ids, context_input_ids=too_long)
        with pytest.raises(ValueError, match="Cut the text into segments of at most 20 tokens"):
            short.get_context_features(too_long)


class TestPrompts:
    def test_many_segments_in_one_prompt(self, short):
        ids = torch.tensor([block(short) * 11])
        context = torch.ones(1, 11, 3, dtype=torch.long)
        message = "the prompts of 66 tokens, 11 contexts among them, take 66 positions, and the decoder has 60"
        hook = short.model.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder ran"))
        try:
            for call in (short, short.generate):
                with pytest.raises(ValueError, match=message):
                    call(ids, context_input_ids=context)
        finally:
            hook.remove()

    def test_a_stride_takes_more_positions(self):
        model = make_model(text_config=gpt2(60), latent_stride=10)
        ids = torch.tensor([block(model) * 2])
        with pytest.raises(
            ValueError, match="of 12 tokens, 2 contexts among them, take 84 positions, and the decoder"
        ):
            model.generate(ids, context_input_ids=torch.ones(1, 2, 3, dtype=torch.long))

    def test_the_models_own_number_is_fitted(self, short):
        """Saved settings of 500 new tokens: the last position is the end."""
        assert short.generate(torch.tensor([[1, 2, 3]])).shape == (1, 61)
        context = {"context_input_ids": torch.ones(1, 3, dtype=torch.long)}
        assert short.generate(torch.tensor([[*block(short), 1]]), **context).shape == (1, 61)
        assert short.generate(inputs_embeds=torch.zeros(1, 50, 32)).shape == (1, 11)

    @pytest.mark.parametrize(
        "options", [{"max_new_tokens": 59}, {"max_length": 62}, {"generation_config": GenerationConfig(max_length=62)}]
    )
    def test_more_new_tokens_than_positions(self, short, options):
        message = (
            "prompts of 3 tokens and `max_new_tokens`=59 do not fit the decoder's 60 positions. Ask for at most 58"
        )
        with pytest.raises(ValueError, match=message):
            short.generate(torch.tensor([[1, 2, 3]]), **options)

    def test_a_cache_takes_positions_too(self, short):
        first = short(torch.ones(1, 59, dtype=torch.long), use_cache=True)
        cache = first[1]
        short(torch.tensor([[1]]), past_key_values=cache)
        with pytest.raises(ValueError, match="the prompts of 61 tokens, 0 contexts among them, take 61 positions"):
            short(torch.tensor([[1]]), past_key_values=cache)

    @pytest.mark.parametrize(("case", "limit"), [(case, 20 + i) for i, case in enumerate(BEYOND)])
    @torch.no_grad()
    def test_computed_positions_have_no_end_but_a_warning_once(self, caplog, case, limit):
        """Rotary positions go on; a limit of its own for each case, because what was said is not said again."""
        stride = 4 if "stride" in case else None
        model = make_model(text_config=sub_config(max_position_embeddings=limit), latent_stride=stride)
        assert model.model.decoder_positions is None
        logging.get_logger("transformers").propagate = True
        message = f"prompt and reply take more than the {limit} positions the decoder was made for"
        BEYOND[case](model, limit)
        assert message not in caplog.text
        for _ in range(2):
            BEYOND[case](model, limit + 1)
        assert caplog.text.count(message) == 1


@pytest.fixture(scope="module")
def endless():
    model = make_model()
    model.generation_config.eos_token_id = None
    model.generation_config.max_new_tokens = 30
    return model


class TestMaxLength:
    """`max_length` counts the prompt, whatever number of new tokens the model's settings name."""

    @pytest.mark.parametrize(
        "options", [{"max_length": 9}, {"generation_config": GenerationConfig(max_length=9, pad_token_id=256)}]
    )
    def test_wins_over_saved_settings(self, endless, options):
        ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
        assert endless.generate(ids, **options).shape == (1, 9)
        embeds = endless.get_input_embeddings()(ids)
        assert endless.generate(inputs_embeds=embeds, **options).shape == (1, 3)

    def test_with_a_context_and_in_line(self, endless, processor):
        inputs = processor.apply_chat_template(processor.restore_messages("abcdefghi"))
        length = inputs["input_ids"].shape[1]
        assert endless.generate(**inputs, max_length=length + 3).shape == (1, length + 3)
        inline = processor.tokenizer.apply_chat_template(
            processor.restore_messages("abcdefghi"), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        length = inline["input_ids"].shape[1]
        assert endless.generate(**inline, max_length=length + 3).shape == (1, length + 3)
        assert endless.generate(**inline, min_length=length + 5, max_length=length + 5).shape == (1, length + 5)

    def test_new_tokens_given_with_it_win(self, endless):
        ids = torch.tensor([[1, 2, 3]])
        assert endless.generate(ids, max_new_tokens=4).shape == (1, 7)
        assert endless.generate(ids).shape == (1, 33)

    def test_no_room_for_a_reply(self, endless):
        with pytest.raises(ValueError, match="`max_length`=3 counts the prompt, which has 3 tokens: there is no room"):
            endless.generate(torch.tensor([[1, 2, 3]]), max_length=3)


class TestMixedTypes:
    """A part that is trained is kept in float32 beside a bfloat16 model."""

    @pytest.mark.parametrize("finer", ["projector", "latent_queries", "both"])
    def test_finer_parts(self, finer):
        model = make_model().to(torch.bfloat16)
        for name in ("projector", "latent_queries"):
            if finer in (name, "both"):
                getattr(model.model, name).float()
        ids, context = torch.tensor([[*block(model), 2, 3]]), torch.tensor([[5, 6, 7]])
        output = model(ids, context_input_ids=context, labels=ids)
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        assert model.model.projector.weight.grad.dtype == model.model.projector.weight.dtype
        whole = make_model()
        expected = whole.get_context_features(context)
        torch.testing.assert_close(model.get_context_features(context).float(), expected, atol=0.3, rtol=0.1)
        assert model.generate(ids, context_input_ids=context, max_new_tokens=2).shape[1] <= ids.shape[1] + 2
