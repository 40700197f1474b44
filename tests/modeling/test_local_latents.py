"""Latents made from the tokens they stand for, against a mask written out in plain Python."""

from __future__ import annotations

import pytest
import torch

from c3_hf import C3Config
from c3_hf.modeling.positions_c3 import local_mask
from factories import NUM_LATENTS, make_config, make_model


STRIDE = 3


@pytest.fixture(scope="module")
def model():
    return make_model(latent_stride=STRIDE, local_latents=True)


def latents(model, rows: list[list[int]], side: str = "right", strides: int = STRIDE) -> torch.Tensor:
    length = max(map(len, rows))
    ids = torch.full((len(rows), 1, length), 256)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), None)
        ids[row, 0, place], mask[row, 0, place] = torch.tensor(tokens, dtype=torch.long), 1
    with torch.no_grad():
        return model.model.get_context_features(ids, mask, torch.full((len(rows), 1), strides))[:, 0]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_mask_token_by_token(model, stride):
    length, padding = 7, 2
    text = [0] * padding + [1] * (length - padding)
    attention_mask = torch.tensor([text + [1] * (1 + NUM_LATENTS)])
    ends = [(latent + 1) * stride - 1 for latent in range(NUM_LATENTS)]
    positions = [*[0] * padding, *range(length - padding), length - padding, *ends]
    mask = local_mask(model.config, attention_mask, torch.tensor([positions]), torch.tensor([stride]), torch.float32)
    for query in range(length + 1 + NUM_LATENTS):
        for key in range(length + 1 + NUM_LATENTS):
            if query == key:
                sees = True
            elif key > query or key < padding:
                sees = False
            elif query < length:
                sees = True
            elif query == length:
                sees = False
            else:
                end = ends[query - length - 1]
                sees = key == length or (key < length and end - stride < positions[key] <= end)
            assert (mask[0, 0, query, key] == 0) == sees, (query, key)
            assert sees or mask[0, 0, query, key] == torch.finfo(torch.float32).min


def test_a_latent_knows_nothing_of_the_text_behind_its_stretch(model):
    text = list(range(65, 65 + 9))
    other = [*text[:6], 33, 34, 35]
    ours, theirs = latents(model, [text])[0], latents(model, [other])[0]
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=1e-5)
    assert (ours[2] - theirs[2]).abs().max() > 1e-3


def test_a_latent_behind_the_text_is_the_same_for_every_text(model):
    ours, theirs = latents(model, [[65] * 3])[0], latents(model, [[90, 91, 92]])[0]
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-5)
    assert (ours[0] - theirs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("strides", [1, 2, 3])
def test_padding_changes_nothing(model, strides):
    rows = [list(range(65, 65 + 11)), [70, 71, 72], []]
    left, right = (latents(model, rows, side, strides) for side in ("left", "right"))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    for row, tokens in enumerate(rows[:2]):
        torch.testing.assert_close(latents(model, [tokens], strides=strides)[0], left[row], rtol=1e-4, atol=1e-5)


def test_eager_and_sdpa_agree(model):
    rows = [list(range(65, 65 + 11)), [70, 71, 72]]
    expected = latents(model, rows)
    eager = make_model(latent_stride=STRIDE, local_latents=True, attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(latents(eager, rows), expected, rtol=1e-4, atol=1e-5)


def test_attention_without_masks_by_rows_is_refused(model):
    config = make_config(latent_stride=STRIDE, local_latents=True)
    config.encoder_config._attn_implementation = "flash_attention_2"
    row = torch.ones(1, 4 + 1 + NUM_LATENTS, dtype=torch.long)
    with pytest.raises(ValueError, match="`local_latents` needs eager or sdpa attention in the encoder"):
        local_mask(config, row, row, torch.tensor([1]), torch.float32)


def test_it_needs_a_stride():
    with pytest.raises(ValueError, match="`local_latents` is set without a `latent_stride`"):
        make_config(local_latents=True)


def test_it_is_saved(tmp_path):
    make_config(latent_stride=STRIDE, local_latents=True).save_pretrained(tmp_path)
    assert C3Config.from_pretrained(tmp_path).local_latents
