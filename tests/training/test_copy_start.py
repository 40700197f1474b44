from __future__ import annotations

import pytest
import torch

import factories
from c3_hf import C3ForConditionalGeneration
from c3_hf.training.copy_start import start_with_copying


REPEAT, FIND = "Repeat it: ", "Look it up "


def gpt2(layers, **changes):
    return {
        "model_type": "gpt2",
        "vocab_size": factories.VOCAB_SIZE,
        "n_embd": 256,
        "n_layer": layers,
        "n_head": 8,
        "n_inner": 512,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **changes,
    }


def prompt_ids(processor, request):
    content = [{"type": "context", "text": "x"}, {"type": "text", "text": request}]
    return processor.apply_chat_template([{"role": "user", "content": content}])["input_ids"][0].tolist()


def start(tokens_per_latent=4, encoder=None, decoder=None, num_latents=16, find=False):
    torch.manual_seed(0)
    halves = {"encoder_config": encoder or gpt2(2), "text_config": decoder or gpt2(2)}
    config = factories.make_config(num_latents=num_latents, tie_word_embeddings=True, **halves)
    model = C3ForConditionalGeneration(config)
    processor = factories.make_processor(num_latents=num_latents)
    prompt, finding = (prompt_ids(processor, request) for request in (REPEAT, FIND))
    cue = next(place for place, ids in enumerate(zip(prompt, finding)) if ids[0] != ids[1])
    end_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    start_with_copying(model, prompt, cue, end_id, tokens_per_latent, finding[cue] if find else None)
    return model.eval(), processor, prompt


@pytest.mark.parametrize(
    "tokens_per_latent", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]
)
def test_an_untrained_model_copies_random_tokens_of_any_length_and_stops(tokens_per_latent):
    model, processor, prompt = start(
        tokens_per_latent, encoder=gpt2(2, n_head=9, n_embd=288), decoder=gpt2(3, n_head=9, n_embd=288)
    )
    end_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for length in (1, 7, 16 * tokens_per_latent):
        context = torch.randint(0, 256, (4, length))
        wanted = torch.nn.functional.pad(context, (0, 1), value=end_id)
        inputs = {"input_ids": torch.tensor([prompt] * 4), "context_input_ids": context}
        output = model.generate(**inputs, max_new_tokens=length + 1, do_sample=False, eos_token_id=end_id)
        assert (output[:, len(prompt) :] == wanted).float().mean() > 0.99


def test_another_prompt_is_not_answered_with_a_copy():
    model, processor, prompt = start()
    for request, copies in ((REPEAT, True), ("Explain it ", False)):
        context = torch.randint(0, 256, (8, 40))
        ids = torch.tensor([prompt_ids(processor, request)] * 8)
        assert ids.shape[1] == len(prompt)
        with torch.no_grad():
            logits = model(torch.cat([ids, context], dim=1), context_input_ids=context).logits[:, len(prompt) - 1 : -1]
        share = (logits.argmax(-1) == context).float().mean()
        assert share > 0.99 if copies else share < 0.05


@pytest.fixture(scope="module")
def finder():
    shape = {"n_embd": 440, "n_head": 20}
    return start(tokens_per_latent=18, encoder=gpt2(2, **shape), decoder=gpt2(4, **shape), find=True)


def next_words(model, prompt, context, *words):
    ids = torch.cat([torch.tensor([prompt] * len(context)), *words], dim=1)
    with torch.no_grad():
        return model(ids, context_input_ids=context).logits.argmax(-1)[:, len(prompt) :]


def test_a_reply_begun_with_words_of_the_text_goes_on_from_them(finder):
    model, processor, _ = finder
    context = torch.stack([torch.randperm(256) for _ in range(8)])
    # Every place of a latent is among them, and the borders between latents.
    words = context[:, 30:130]
    found = next_words(model, prompt_ids(processor, FIND), context, words)
    assert (found == context[:, 31:131])[:, 2:].float().mean() > 0.85


def test_words_that_come_twice_are_told_apart_by_the_two_before_them(finder):
    model, processor, _ = finder
    context = torch.stack([torch.randperm(256) for _ in range(8)])
    context[:, 137] = context[:, 52]
    with torch.no_grad():
        latents = model.get_context_features(context)
    for request, finds in ((FIND, True), ("Explain it ", False)):
        for place in (52, 137):
            ids = torch.cat(
                [torch.tensor([prompt_ids(processor, request)] * 8), context[:, place - 2 : place + 1]], dim=1
            )
            with torch.no_grad():
                found = model(ids, context_latents=latents, logits_to_keep=1).logits[:, -1].argmax(-1)
            share = (found == context[:, place + 1]).float().mean()
            assert share > 0.7 if finds else share < 0.1


def test_a_model_that_finds_copies_as_well(finder):
    model, _, prompt = finder
    context = torch.randint(0, 256, (4, 16 * 18))
    found = next_words(model, prompt[:-1], context, torch.tensor([prompt[-1:]] * 4), context[:, :-1])
    assert (found == context).float().mean() > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": factories.sub_config(hidden_size=256)}, "`copy_start` is laid into GPT-2 halves, got 'qwen2'"),
        ({"encoder": gpt2(2, n_embd=128, n_head=4)}, "`copy_start` needs two halves with the same"),
        ({"tokens_per_latent": 9}, "`copy_start` may be 1 to 7, one less than the number of heads, got 9"),
        ({"tokens_per_latent": 0}, "`copy_start` may be 1 to 7, one less than the number of heads, got 0"),
        ({"decoder": gpt2(1)}, "`copy_start` needs a decoder of 2 layers or more"),
        ({"num_latents": 70}, "`copy_start` needs heads of at least 36 dimensions for 70 latents, got 32"),
        (
            {"find": True},
            "`find_start` with `copy_start` 4 needs at least 6 heads and a decoder of 4 layers, got 8 heads",
        ),
        ({"find": True, "decoder": gpt2(4), "tokens_per_latent": 8}, "`copy_start` may be 1 to 7"),
        ({"find": True, "decoder": gpt2(4), "tokens_per_latent": 5}, "`find_start` needs an even `copy_start`, got 5"),
        (
            {"find": True, "decoder": gpt2(4, n_embd=120), "encoder": gpt2(2, n_embd=120)},
            "`find_start` needs heads of at least 20 dimensions and 9 dimensions of each word in a latent, got 15",
        ),
        (
            {"encoder": gpt2(2, n_embd=80), "decoder": gpt2(2, n_embd=80), "tokens_per_latent": 7},
            "`copy_start` keeps 7 dimensions of each word, and 512 words need at least 9",
        ),
    ],
)
def test_models_it_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        start(**changes)
