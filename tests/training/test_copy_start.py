from __future__ import annotations

import pytest
import torch

import factories
from c3_hf import C3ForConditionalGeneration
from c3_hf.training.copy_start import addresses, make_codes, start_with_copying


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


def start(tokens_per_latent=4, encoder=None, decoder=None, num_latents=16):
    torch.manual_seed(0)
    halves = {"encoder_config": encoder or gpt2(2), "text_config": decoder or gpt2(2)}
    config = factories.make_config(num_latents=num_latents, tie_word_embeddings=True, **halves)
    model = C3ForConditionalGeneration(config)
    processor = factories.make_processor(num_latents=num_latents)
    prompt, other = (prompt_ids(processor, request) for request in ("Repeat it: ", "Explain it "))
    cue = next(place for place, ids in enumerate(zip(prompt, other)) if ids[0] != ids[1])
    end_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    start_with_copying(model, prompt, cue, end_id, tokens_per_latent)
    return model.eval(), processor, prompt


@pytest.mark.parametrize("tokens_per_latent", [1, 3, 8])
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
    for request, copies in (("Repeat it: ", True), ("Explain it ", False)):
        context = torch.randint(0, 256, (8, 40))
        ids = torch.tensor([prompt_ids(processor, request)] * 8)
        assert ids.shape[1] == len(prompt)
        with torch.no_grad():
            logits = model(torch.cat([ids, context], dim=1), context_input_ids=context).logits[:, len(prompt) - 1 : -1]
        share = (logits.argmax(-1) == context).float().mean()
        assert share > 0.99 if copies else share < 0.05


def test_codes_of_words_are_far_apart():
    codes = make_codes(8192, 19)
    distances = (19 - codes @ codes.T) / 2
    assert codes.shape == (8192, 19)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert distances.fill_diagonal_(19).min() == 4


@pytest.mark.parametrize(("num_words", "size"), [(1, 1), (2, 1), (5, 3), (264, 9), (264, 12), (264, 40)])
def test_codes_differ_however_few_signs_there_are(num_words, size):
    assert len(make_codes(num_words, size).unique(dim=0)) == num_words


def test_addresses_agree_with_themselves_only():
    table = addresses(torch.arange(6), 3)
    assert torch.equal((table @ table.T == 1), torch.eye(6, dtype=torch.bool))
    assert torch.equal(addresses(torch.tensor([-1, 6]), 3), torch.zeros(2, 3))


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
            {"encoder": gpt2(2, n_embd=80), "decoder": gpt2(2, n_embd=80), "tokens_per_latent": 7},
            "`copy_start` keeps 7 dimensions of each word, and 264 words need at least 9",
        ),
    ],
)
def test_models_it_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        start(**changes)
