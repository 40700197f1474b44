"""The decoder's cache under either of its names: taken, handed on, kept for another turn, without a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from c3_hf.modeling.generation_c3 import CACHE_NAME
from factories import make_model, sub_config


NEW = {"max_new_tokens": 8, "do_sample": False}
NAMES = ["past_key_values", "cache"]


@pytest.fixture(scope="module", params=[None, 3], ids=["no stride", "stride"])
def strided(request):
    return make_model(latent_stride=request.param)


@pytest.fixture(autouse=True)
def nothing_is_said(caplog):
    """transformers says once that an old name is old; it is to say it of no call of this package."""
    logging.get_logger("transformers").propagate = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert "deprecated" not in caplog.text


def new_cache(model):
    return DynamicCache(config=model.config.get_text_config())


@pytest.fixture
def inputs(processor):
    return processor.apply_chat_template(processor.restore_messages("hello world"))


@torch.no_grad()
def greedy_loop(model, inputs, steps=8):
    """By forward() alone, without a cache."""
    ids, new = inputs["input_ids"], []
    contexts = {name: inputs[name] for name in inputs if name.startswith("context")}
    for _ in range(steps):
        new.append(model(ids, use_cache=False, **contexts).logits[0, -1].argmax().item())
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
        if new[-1] in model.generation_config.eos_token_id:
            break
    return new


def reply(outputs, length):
    return outputs[0, length:].tolist()


@pytest.mark.parametrize("name", NAMES)
class TestEitherName:
    @torch.no_grad()
    def test_stepwise_forward(self, strided, inputs, name):
        cache, new = new_cache(strided), []
        step = dict(inputs)
        step.pop("attention_mask")
        for _ in range(8):
            output = strided(**step, **{name: cache})
            assert getattr(output, CACHE_NAME) is cache
            new.append(output.logits[0, -1].argmax().item())
            if new[-1] in strided.generation_config.eos_token_id:
                break
            step = {"input_ids": torch.tensor([new[-1:]])}
        assert new == greedy_loop(strided, inputs)

    def test_generate_fills_the_given_cache(self, strided, inputs, name):
        cache = new_cache(strided)
        length = inputs["input_ids"].shape[1]
        new = reply(strided.generate(**inputs, **NEW, **{name: cache}), length)
        assert new == greedy_loop(strided, inputs)
        assert cache.get_seq_length() == length + len(new) - 1

    @pytest.mark.parametrize("again", [True, False], ids=["latents again", "latents in the cache"])
    def test_a_second_turn(self, strided, processor, inputs, name, again):
        cache = new_cache(strided)
        length = inputs["input_ids"].shape[1]
        strided.generate(**inputs, **NEW, **{name: cache})
        cache.crop(length - cache.get_seq_length())
        turns = [
            *processor.restore_messages("hello world"),
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "and now?"},
        ]
        second = processor.apply_chat_template(turns)
        expected = greedy_loop(strided, second)
        if not again:
            second = {key: second[key] for key in ("input_ids", "attention_mask")}
        kept = strided.generate(**second, **NEW, **{name: cache})
        assert reply(kept, second["input_ids"].shape[1]) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2},
        {"assistant_model": "another"},
    ],
    ids=["dynamic", "none", "static", "lookup", "beams", "assisted"],
)
class TestPromptsAsEmbeddings:
    """Ids, embeddings, both, and latents with either: one reply."""

    def generate(self, model, options, **inputs):
        options = dict(options)
        if "assistant_model" in options:
            stride = model.config.latent_stride
            options["assistant_model"] = make_model(
                seed=5, encoder_config=sub_config(hidden_size=8, head_dim=2), latent_stride=stride
            )
        return model.generate(**inputs, **NEW, **options)

    def test_all_forms(self, strided, inputs, options):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        contexts = {name: inputs[name] for name in inputs if name.startswith("context")}
        latents = {"context_latents": strided.get_context_features(*contexts.values()).detach()}
        embeds = strided.get_input_embeddings()(ids).detach()
        length = ids.shape[1]
        expected = reply(self.generate(strided, options, input_ids=ids, attention_mask=mask, **contexts), length)
        if "num_beams" not in options:
            # Assisted decoding of transformers 4.57 can overshoot by an accepted candidate.
            assert expected[:8] == greedy_loop(strided, inputs)
        assert reply(self.generate(strided, options, input_ids=ids, **latents), length) == expected
        both = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask, **latents}
        if set(options) & {"prompt_lookup_num_tokens", "assistant_model"}:
            with pytest.raises(
                ValueError, match="cannot be combined with `inputs_embeds`: guessed tokens are checked"
            ):
                self.generate(strided, options, **both)
            return
        assert reply(self.generate(strided, options, **both), length) == expected
        if "use_cache" in options:
            # transformers itself loses a prompt that it has no ids of.
            return
        for given in (contexts, latents, {**latents, "attention_mask": mask}):
            assert reply(self.generate(strided, options, inputs_embeds=embeds, **given), 0) == expected


@torch.no_grad()
def test_a_long_reply_to_embeddings(strided, inputs):
    """Longer than the prompt: what was generated is never taken for the prompt."""
    block = [261, *[263] * 4, 262]
    ids = torch.tensor([[*block, 7, 8]])
    contexts = {name: inputs[name] for name in inputs if name.startswith("context")}
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": -1, "pad_token_id": 256}
    by_ids = strided.generate(ids, **contexts, **options)[0, 8:]
    by_embeds = strided.generate(inputs_embeds=strided.get_input_embeddings()(ids), **contexts, **options)[0]
    assert by_embeds.tolist() == by_ids.tolist()


def test_an_emptied_cache_is_a_new_one(strided, inputs):
    plain = {"input_ids": torch.tensor([[1, 2, 3]])}
    cache = new_cache(strided)
    strided.generate(**inputs, **NEW, past_key_values=cache)
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0
    again = strided.generate(**plain, **NEW, past_key_values=cache)
    assert again.tolist() == strided.generate(**plain, **NEW).tolist()


def test_outputs_and_tuples(model, inputs):
    output = model(**inputs, use_cache=True)
    assert getattr(output, CACHE_NAME).get_seq_length() == inputs["input_ids"].shape[1]
    as_tuple = model(**inputs, use_cache=True, return_dict=False)
    assert isinstance(as_tuple[1], DynamicCache)
    in_dict = model.generate(**inputs, **NEW, return_dict_in_generate=True)
    assert getattr(in_dict, CACHE_NAME).get_seq_length() > inputs["input_ids"].shape[1]


def test_a_configuration_that_asks_for_tuples(inputs):
    model = make_model()
    expected = model(**inputs).logits
    model.config.return_dict = False
    as_tuple = model(**inputs)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], expected)


def test_two_caches(model, inputs):
    caches = {name: new_cache(model) for name in NAMES}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="`past_key_values` and `cache` are two names of one argument, got both"):
            call(**inputs, **caches)


def test_a_stray_marker_stops_no_prompt_without_a_context(model):
    """Alone, and in a row of its own beside a row that has a context."""
    start, pad, end = (model.config.context_start_token_id, model.config.context_token_id,
                       model.config.context_end_token_id)  # fmt: skip
    stray = [5, end, 7, start, 8, start]
    with torch.no_grad():
        alone = model(torch.tensor([stray])).logits[0, -1]
        model.generate(torch.tensor([stray]), **NEW)
        rows = torch.tensor([[start, *[pad] * 4, end], stray])
        context = torch.tensor([[[1, 2]], [[0, 0]]])
        mask = torch.tensor([[[1, 1]], [[0, 0]]])
        both = model(rows, context_input_ids=context, context_attention_mask=mask).logits
    torch.testing.assert_close(both[1, -1], alone)
