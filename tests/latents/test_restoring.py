"""A text restored alone is drafted from itself: fewer steps, the same tokens."""

from __future__ import annotations

import pytest
import torch

from c3_hf.latents.decoding import Restorer
from c3_hf.pipeline import C3Pipeline
from factories import make_model, make_processor


NEW_TOKENS = 40


@pytest.fixture
def no_blocks(monkeypatch):
    """A model for which guessing blocks (tests/latents/test_guessing.py) does not pay."""
    monkeypatch.setattr(Restorer, "_can_guess", lambda _: False)


def count_steps(restorer: Restorer, latents: torch.Tensor, **options) -> tuple[list[int], int]:
    """What the first row generates, and how often the decoder ran for it."""
    steps = []
    handle = restorer.model.model.language_model.register_forward_hook(lambda *_: steps.append(1))
    new_ids = restorer.generate(latents, NEW_TOKENS, **options)[0]
    handle.remove()
    return new_ids, len(steps)


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("seed", range(4))
def test_drafting_gives_the_same_tokens_in_fewer_steps(seed):
    restorer = Restorer(make_model(seed), make_processor())
    latents = restorer.model.get_context_features(torch.arange(30).unsqueeze(0))[0]
    alone, steps_alone = count_steps(restorer, latents)
    twice, steps_twice = count_steps(restorer, latents.expand(2, -1, -1))
    assert alone == twice
    # Random weights soon go round in circles, which is what a lookup guesses best.
    assert steps_alone < steps_twice


@pytest.mark.usefixtures("no_blocks")
def test_forced_tokens_and_static_caches_are_not_drafted():
    restorer = Restorer(make_model(), make_processor())
    latents = restorer.model.get_context_features(torch.arange(30).unsqueeze(0))[0]
    _, steps = count_steps(restorer, latents, forced=[[]], lengths=[NEW_TOKENS - 1])
    assert steps == NEW_TOKENS
    plain, _ = count_steps(restorer, latents)
    restorer.model.generation_config.cache_implementation = "static"
    static, steps = count_steps(restorer, latents)
    assert static == plain
    assert steps >= len(static)


def test_batches_restore_as_single_texts_do_in_whatever_dtype_comes_next():
    model, processor = make_model(), make_processor()
    texts = ["one text", "and another one", "a third"]

    def restored():
        return C3Pipeline(model, processor).round_trip(texts, max_new_tokens=6)

    alone = [C3Pipeline(model, processor).round_trip([text], max_new_tokens=6)[0] for text in texts]
    assert restored() == alone
    # A cache kept from one call would have the wrong dtype in the next.
    with torch.autocast("cpu", torch.bfloat16):
        assert len(restored()) == 3
    assert restored() == alone
    model.to(torch.bfloat16)
    assert len(restored()) == 3
