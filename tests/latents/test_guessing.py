"""Guessing many tokens at once gives what decoding token by token gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

from c3_hf.latents import decoding
from c3_hf.latents.decoding import ForcedTokens, Restorer, guess_in_blocks, has_full_attention
from factories import make_model, make_processor, sub_config


STOP = 5


class Counting(torch.nn.Module):
    """A decoder that writes what is at its position and looks at nothing else; row r is r places ahead."""

    def __init__(self, model, text: list[int], word_counts: bool = False):
        super().__init__()
        self.config, self.text, self.word_counts = model.config, text, word_counts
        self.passes: list[int] = []

    def forward(self, input_ids, past_key_values, use_cache, context_latents=None, logits_to_keep=0):
        rows, length = input_ids.shape
        start = past_key_values.get_seq_length()
        # As keys and values: what tells the rows apart after some have left.
        if start == 0:
            states = torch.arange(rows).view(rows, 1, 1, 1).expand(rows, 1, length, 1).float()
        else:
            states = past_key_values.layers[0].keys[:, :, :1].expand(-1, -1, length, -1)
        for layer in range(self.config.text_config.num_hidden_layers):
            past_key_values.update(states, states, layer)
        ahead = states[:, 0, 0, 0].long()
        self.passes.append(length)
        places = (start + torch.arange(length) + ahead[:, None]) % len(self.text)
        chosen = torch.tensor(self.text)[places]
        if self.word_counts:
            chosen = (chosen + input_ids) % 50 + 6
        logits = torch.nn.functional.one_hot(chosen, 300).float()
        return type("Output", (), {"logits": logits})()


def by_token(model, prompt_ids, new_tokens: int) -> list[list[int]]:
    """The same decoder, token by token."""
    cache = DynamicCache(config=model.config.text_config)
    model(prompt_ids[:, :-1], cache, True)
    ids = prompt_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids[:, -1:], cache, True).logits.argmax(-1)], dim=1)
    rows = ids[:, prompt_ids.shape[1] :].tolist()
    return [row[: row.index(STOP) + 1] if STOP in row else row for row in rows]


def guess(model, prompts, new_tokens: int, forced=None):
    return guess_in_blocks(model, prompts, {}, new_tokens, forced, [STOP], [])


def test_a_decoder_that_counts_takes_two_passes_a_block():
    text = [10 + place % 180 for place in range(400)]
    text[149] = STOP
    model = Counting(make_model(), text)
    prompts = torch.full((3, 7), 9)
    found = guess(model, prompts, 200)
    # The prompt, sixteen tokens twice, then blocks of 64 twice.
    assert model.passes == [6, 16, 16, 64, 64, 64, 64]
    assert found == by_token(model, prompts, 200)
    assert [len(row) for row in found] == [144, 143, 142]


def test_rows_that_stop_leave_the_others_go_on_and_the_last_token_counts():
    text = [10 + place % 180 for place in range(400)]
    text[20] = text[21] = text[95] = STOP
    model = Counting(make_model(), text)
    prompts = torch.full((40, 7), 9)
    found = guess(model, prompts, 60)
    assert found == by_token(model, prompts, 60)
    assert {len(row) for row in found} >= {60, 15, 1}


def test_a_decoder_that_needs_the_words_is_left_with_what_is_certain():
    model = Counting(make_model(), list(range(10, 200)), word_counts=True)
    prompts = torch.full((2, 7), 9)
    found = guess(model, prompts, 60)
    assert model.passes == [6, 16, 16, 16]
    assert [len(row) for row in found] == [3, 3]
    assert found == [row[:3] for row in by_token(model, prompts, 60)]


def test_forced_tokens_are_guessed_too():
    model = Counting(make_model(), list(range(10, 200)))
    prompts = torch.full((2, 7), 9)
    forced = torch.full((2, 31), -1)
    forced[0, 4], forced[0, 12], forced[1, 30] = 7, STOP, STOP
    found = guess(model, prompts, 60, forced)
    assert [len(row) for row in found] == [13, 31]
    assert found[0][4] == 7
    assert found[1][:4] == [17, 18, 19, 20]


@pytest.mark.parametrize("block", [2, 16])
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_restorer_gives_what_generate_gives(seed, batch_size, block, monkeypatch):
    # In blocks of two tokens half of the guesses of a random model are confirmed, in blocks of sixteen none.
    monkeypatch.setattr(decoding, "_FIRST_BLOCK", block)
    monkeypatch.setattr(decoding, "_BLOCK_TOKENS", block)
    model = make_model(seed)
    restorer = Restorer(model, make_processor())
    contexts = torch.randint(0, 200, (batch_size, 20), generator=torch.Generator().manual_seed(seed))
    latents = model.get_context_features(contexts)
    prompts = restorer.prompt_ids.expand(batch_size, -1)
    lengths = [25, 3, 30, 9, 14][:batch_size]
    forced = torch.full((batch_size, max(lengths) + 1), -1)
    for row, length in enumerate(lengths):
        forced[row, length // 2], forced[row, length] = 40 + row, restorer.stop_ids[0]
    expected = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        context_latents=latents,
        logits_processor=LogitsProcessorList([ForcedTokens(forced)]),
        max_new_tokens=max(lengths) + 1,
        do_sample=False,
    )[:, prompts.shape[1] :].tolist()
    corrections = [[(length // 2, 40 + row)] for row, length in enumerate(lengths)]
    found = restorer.generate(latents[:, 0], max(lengths) + 1, None, corrections, lengths)
    for row, length in enumerate(lengths):
        stops = [place for place, token in enumerate(expected[row]) if token in restorer.stop_ids]
        end = min([length, *stops])
        assert found[row][:end] == expected[row][:end]


SETTLED, GIVEN_UP = [9] * 40, [9]


@pytest.mark.parametrize(
    ("first", "others", "expected"),
    [
        (SETTLED, SETTLED, [(1, 16), (4, 40), (4, 40)]),
        (GIVEN_UP, GIVEN_UP, [(1, 16)]),
        # Settled by chance: the batch shows it, and the next one is not tried.
        (SETTLED, GIVEN_UP, [(1, 16), (4, 40)]),
    ],
)
def test_one_row_says_whether_guessing_pays(first, others, expected, monkeypatch):
    calls = []

    def guess_in_blocks(model, prompts, latents, new_tokens, forced, stop_ids, never_ids):
        calls.append((len(prompts), new_tokens))
        return [list(ids[:new_tokens]) for ids in [first, others, others, others][: len(prompts)]]

    monkeypatch.setattr("c3_hf.latents.decoding.guess_in_blocks", guess_in_blocks)
    model = make_model()
    latents = model.get_context_features(torch.arange(30).unsqueeze(0))[0].expand(4, -1, -1)
    restorer = Restorer(model, make_processor())
    restorer.generate(latents, 40)
    restorer.generate(latents, 40)
    assert calls == expected


def test_what_cannot_take_guesses_back_does_not_guess(monkeypatch):
    monkeypatch.setattr("c3_hf.latents.decoding.guess_in_blocks", lambda *_: pytest.fail("guessed"))
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    sliding = make_model(text_config=sub_config(hidden_size=32, **windows))
    assert not has_full_attention(sliding)
    static, suppressing = make_model(), make_model()
    assert has_full_attention(static)
    static.generation_config.cache_implementation = "static"
    suppressing.generation_config.suppress_tokens = [7]
    for model in (sliding, static, suppressing):
        latents = model.get_context_features(torch.arange(30).unsqueeze(0))[0]
        Restorer(model, make_processor()).generate(latents, 4)
