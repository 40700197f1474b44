"""Decoding in stretches gives what `generate()` gives, with fewer rows and a shorter cache."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from c3_hf.latents import decoding
from c3_hf.latents.decoding import ForcedTokens, Restorer, generate_in_stretches
from c3_hf.modeling.generation_c3 import CACHE_NAME
from factories import make_model, make_processor, sub_config


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(decoding, "_STRETCH", 8)


def setup(seed: int = 0, **config):
    """A model, and for six rows prompts, latents and generation settings; stop token 5."""
    model = make_model(seed, **config)
    restorer = Restorer(model, make_processor())
    contexts = torch.randint(0, 200, (6, 20), generator=torch.Generator().manual_seed(seed))
    settings = {"do_sample": False, "eos_token_id": [5], "pad_token_id": 5}
    return (
        model,
        restorer.prompt_ids.expand(6, -1),
        {"context_latents": model.get_context_features(contexts)},
        settings,
    )


def forced_stops(*steps: int) -> torch.Tensor:
    """A stop at one step of each row, and another token before it."""
    forced = torch.full((len(steps), max(steps) + 1), -1)
    for row, step in enumerate(steps):
        forced[row, step] = 5
        if step:
            forced[row, step // 2] = 40 + row
    return forced


def up_to_stop(ids: list[int]) -> list[int]:
    return ids[: ids.index(5) + 1] if 5 in ids else ids


SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}


@pytest.mark.parametrize("decoder", [{}, SLIDING], ids=["full attention", "sliding window"])
@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_are_those_of_generate(seed, decoder):
    model, prompts, contexts, settings = setup(seed, text_config=sub_config(hidden_size=32, **decoder))
    forced = forced_stops(3, 30, 8, 7, 21, 0)
    together = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        **contexts,
        logits_processor=LogitsProcessorList([ForcedTokens(forced)]),
        max_new_tokens=26,
        **settings,
    )[:, prompts.shape[1] :].tolist()
    found = generate_in_stretches(model, prompts, contexts, 26, forced, settings)
    assert [up_to_stop(ids) for ids in found] == [up_to_stop(ids) for ids in together]
    assert len(found[1]) == 26, "this row is still going when the tokens are used up"
    assert found[5][0] == 5


def test_rows_that_are_done_leave_and_the_cache_grows():
    model, prompts, contexts, settings = setup()
    seen: list[tuple[int, int]] = []

    def note(module, args, kwargs):
        seen.append((len(kwargs["inputs_embeds"]), kwargs[CACHE_NAME].layers[0].max_cache_len))

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    generate_in_stretches(model, prompts, contexts, 40, forced_stops(3, 30, 8, 7, 21, 0), settings)
    handle.remove()
    # Rows 0, 3 and 5 stop within the first eight steps, row 2 in the second eight, row 4 in the third.
    assert [rows for rows, _ in seen] == [6] * 8 + [3] * 8 + [2] * 8 + [1] * 7
    assert sorted({length - prompts.shape[1] for _, length in seen}) == [8, 16, 24, 32]


def test_a_stop_in_every_row_ends_it_early():
    model, prompts, contexts, settings = setup()
    found = generate_in_stretches(model, prompts, contexts, 1000, forced_stops(2, 3, 4, 2, 1, 0), settings)
    assert max(map(len, found)) == 5


def test_forced_tokens_touch_no_other_step():
    scores = torch.randn(2, 50)
    forced = torch.full((2, 4), -1)
    forced[1, 2] = 7
    processor = ForcedTokens(forced)
    ids = torch.zeros(2, 10, dtype=torch.long)
    for step in range(6):
        changed = processor(ids[:, : 4 + step], scores)
        if step == 2:
            assert torch.equal(changed[0], scores[0])
            assert changed[1].argmax() == 7
            assert changed[1].isneginf().sum() == 49
        else:
            assert changed is scores


@pytest.mark.parametrize("name", ["context_token_id", "context_start_token_id", "context_end_token_id"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("guesses", [False, True])
def test_a_model_that_wants_to_write_marks_of_contexts_is_not_let(name, rows, guesses):
    model = make_model()
    texts = torch.randint(0, 200, (rows, 20), generator=torch.Generator().manual_seed(0))
    latents = model.get_context_features(texts)[:, 0].detach()
    mark = getattr(model.config, name)

    @torch.no_grad()
    def restored() -> list[list[int]]:
        restorer = Restorer(model, make_processor())
        restorer._guesses = guesses
        return restorer.generate(latents, 30)

    expected = restored()
    assert max(map(len, expected)) > 8, "a second stretch begins"

    def want_the_mark(module, args, outputs):
        outputs.logits[..., mark] += 1e4

    model.register_forward_hook(want_the_mark)
    assert restored() == expected
