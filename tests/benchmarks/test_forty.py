"""The start of the training beyond twenty tokens a latent: what stays of c3-tiny, which heads begin anew, and how."""

from __future__ import annotations

import benchmarks.c3_tiny_forty as forty
import pytest
import torch
from benchmarks.restoring_by_ratio import Item

from c3_hf import C3Pipeline
from factories import make_model, make_processor


def latents_of(pipe, ids, stride):
    strides = torch.tensor([[stride]])
    return pipe.model.get_context_features(ids[:, None], torch.ones_like(ids)[:, None], strides)[0, 0]


def test_up_to_twenty_tokens_a_latent_the_start_is_the_model_in_the_package():
    packaged, start = C3Pipeline.from_pretrained(dtype="float32"), forty.with_fewer_latents()
    assert start.model.config.longest_segment == packaged.model.config.longest_segment == 640
    assert start.processor.num_latents == start.model.config.num_latents == 16
    assert start.processor.prompts.keys() == {"restore"}
    ids = torch.randint(100, 7000, (1, 320), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents_of(start, ids, 20), latents_of(packaged, ids, 20)[:16], rtol=1e-4, atol=1e-4)
    tokens = ids[0].tolist()
    assert torch.cat(forty.come_back(start, [tokens], 20)).float().mean() > 0.98


@pytest.fixture
def half():
    llama = {"model_type": "llama", "attention_bias": True, "vocab_size": 264, "hidden_size": 32, "head_dim": 8}
    llama |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    return make_model(encoder_config=llama).model.encoder


def test_spare_are_those_that_can_be_left_out_together(half, monkeypatch):
    # Of two that do the same either is spare, and not both; one is needed by itself.
    twins, needed = {(0, 3), (1, 2)}, (1, 0)

    def accuracy(pipe, sequences):
        silent = {
            (layer, head)
            for layer in range(2)
            for head in range(4)
            if not half.layers[layer].self_attn.o_proj.weight[:, forty.rows_of(half, head)].any()
        }
        return 1 - 0.5 * (twins <= silent) - 0.5 * (needed in silent) - 0.001 * len(silent)

    monkeypatch.setattr(forty, "accuracy", accuracy)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    assert forty.spare_heads(None, half, []) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 3)]
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def test_heads_drawn_anew_are_silent_and_look_at_distances(half):
    before = {name: value.clone() for name, value in half.state_dict().items()}
    forty.draw_anew(half, [(1, 2)], 5.0, torch.Generator().manual_seed(0))
    for name, value in half.state_dict().items():
        changed = (value != before[name]).any(dim=tuple(range(1, value.dim())))
        if name.startswith("layers.1.self_attn.") and "o_proj" not in name:
            # A bias of values was zero and stays so.
            assert changed.nonzero().flatten().tolist() == ([] if "v_proj.bias" in name else list(range(16, 24))), name
        elif name != "layers.1.self_attn.o_proj.weight":
            assert not changed.any(), name
    attention = half.layers[1].self_attn
    assert not attention.o_proj.weight[:, 16:24].any()
    assert attention.o_proj.weight[:, :16].all()
    biases = torch.cat([attention.q_proj.bias[16:24], attention.k_proj.bias[16:24]])
    assert 2.5 < biases.std() < 7.5


def test_places_are_counted_from_the_end_of_a_stretch(monkeypatch, tmp_path):
    pipe = C3Pipeline(make_model(latent_stride=3), make_processor())
    monkeypatch.setattr(forty, "NUM_LATENTS", 4)
    texts = [forty_item("a", 3, "abcdefghijkl"), forty_item("a", 3, "bcdefghijklm"), forty_item("b", 2, "abcdefgh")]
    monkeypatch.setattr(forty, "held_out_items", lambda *_: texts)
    found = {3: [torch.tensor([False, True, True] * 4), torch.tensor([False, False, True] * 4)]}
    found[2] = [torch.tensor([True, False] * 4)]
    monkeypatch.setattr(forty, "come_back", lambda pipe, sequences, ratio: found[ratio])
    assert forty.measure_stretches(pipe, tmp_path) == [
        {"kind": "a", "ratio": 3, "num_items": 2, "by_place_from_the_end": [1.0, 0.5, 0.0]},
        {"kind": "b", "ratio": 2, "num_items": 1, "by_place_from_the_end": [0.0, 1.0]},
    ]


def forty_item(kind, ratio, text):
    return Item(f"{kind}-{text}", kind, ratio, text)
