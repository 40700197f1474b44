"""Latents that keep the positions of their text, against a re-statement of the layout in plain Python."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel

from c3_hf.modeling.generation_c3 import CACHE_NAME
from c3_hf.modeling.positions_c3 import keep_rows
from factories import NUM_LATENTS, make_config, make_model


STRIDE = 5
BLOCK = [261, *[263] * NUM_LATENTS, 262]
PROMPTS = [[65, 66, *BLOCK, 67, 68], [69, *BLOCK, 70, *BLOCK, 71]]
STRIDES = torch.tensor([[3, 5], [2, 4]])
# Random weights like the markers too; a stray one is another test's matter.
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(256, 264))}


@pytest.fixture(scope="module")
def model():
    return make_model(latent_stride=STRIDE)


def expected_positions(prompt: list[int], strides: list[int]) -> list[int]:
    """The layout, token by token: a block takes 4 * 5 positions, its placeholders lie from the beginning of them."""
    positions, here, seen, begin = [], 0, 0, 0
    for token in prompt:
        if token != 263 or seen >= NUM_LATENTS * len(strides):
            positions.append(here)
            here += 1
            continue
        stride, place = strides[seen // NUM_LATENTS], seen % NUM_LATENTS
        begin = here if place == 0 else begin
        positions.append(begin + (place + 1) * stride - 1)
        here = begin + NUM_LATENTS * STRIDE
        seen += 1
    return positions


def padded(side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, PROMPTS))
    rows, masks = [], []
    for prompt in PROMPTS:
        pad = [256] * (length - len(prompt))
        rows.append(pad + prompt if side == "left" else prompt + pad)
        real, fill = [1] * len(prompt), [0] * len(pad)
        masks.append(fill + real if side == "left" else real + fill)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def contexts() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 250, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 1] = 0
    mask[1, 0, 6:] = 0
    return {"context_input_ids": ids, "context_attention_mask": mask, "context_strides": STRIDES}


def decoder_positions(model, inputs) -> torch.Tensor:
    """What the decoder's body is given."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_positions_are_those_of_the_layout(model, side):
    inputs = padded(side)
    positions = decoder_positions(model, inputs | contexts())
    for row, prompt in enumerate(PROMPTS):
        real = inputs["attention_mask"][row].bool()
        strides = STRIDES[row].tolist()[: prompt.count(261)]
        assert positions[row][real].tolist() == expected_positions(prompt, strides)


@torch.no_grad()
def test_a_token_of_the_reply_lies_at_one_distance_from_its_latent_whatever_the_stride(model):
    distances = set()
    for stride in range(1, STRIDE + 1):
        tokens = torch.arange(NUM_LATENTS * stride)
        prompt = torch.tensor([[65, *BLOCK, 66, *tokens.tolist()]])
        context = {"context_latents": torch.zeros(1, 1, NUM_LATENTS, model.config.text_config.hidden_size)}
        inputs = {"input_ids": prompt, "context_strides": torch.tensor([[stride]]), **context}
        positions = decoder_positions(model, inputs)[0]
        latents, reply = positions[2 : 2 + NUM_LATENTS], positions[-len(tokens) :]
        # The last token of a stretch is place 0 of its latent.
        places = stride - 1 - tokens % stride
        distances |= set((reply - latents[tokens // stride] + places).tolist())
    assert len(distances) == 1


@torch.no_grad()
def test_the_encoder_is_the_bare_half_with_queries_at_the_ends_of_their_stretches(model):
    ids = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
    encoder = model.model.encoder
    table = encoder.get_input_embeddings()
    embeds = torch.cat([table(torch.cat([ids, torch.tensor([[261]])], 1)), model.model.latent_queries.weight[None]], 1)
    positions = torch.tensor([[*range(8), 2, 5, 8, 11]])
    # One whole sequence: a mask of ones says that it is not several packed ones.
    states = encoder(inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones(1, 12)).last_hidden_state
    latents = model.get_encoder_latents(ids, context_strides=torch.tensor([[3]]))
    torch.testing.assert_close(latents[0, 0], states[0, -4:])


@torch.no_grad()
def test_every_latent_sees_the_text_with_and_without_a_mask(model):
    """Without a mask transformers reads positions that jump as packed sequences and hides the text, in silence."""
    ids = torch.tensor([[[10, 11, 12, 13, 14, 15, 16]]])
    changed = ids.clone()
    changed[0, 0, 0] = 99
    for mask in (None, torch.ones_like(ids)):
        difference = model.get_context_features(ids, mask) - model.get_context_features(changed, mask)
        assert (difference.abs().amax(dim=-1) > 1e-3).all()
    whole, masked = (model.get_context_features(ids, mask) for mask in (None, torch.ones_like(ids)))
    torch.testing.assert_close(whole, masked)


@torch.no_grad()
def test_padding_sides_agree(model):
    left, right = (model(**padded(side), **contexts()).logits for side in ("left", "right"))
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(left[row, -len(prompt) :], right[row, : len(prompt)], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_every_step_of_generate_is_a_forward_over_all_of_it(model):
    inputs = padded("left")
    out = model.generate(**inputs, **contexts(), **GREEDY, output_logits=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    for step, logits in enumerate(out.logits):
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, step, dtype=torch.long)], dim=1)
        whole = model(input_ids=out.sequences[:, : length + step], attention_mask=mask, **contexts()).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"do_sample": True, "top_k": 1},
    ],
    ids=["no cache", "static cache", "sampling"],
)
@torch.no_grad()
def test_ways_of_generating_agree(model, options):
    inputs = padded("left") | contexts()
    expected = model.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **(GREEDY | options)).tolist() == expected.tolist()
    inputs["context_latents"] = model.get_context_features(**contexts())
    inputs["context_latents"][0, 1] = 0
    del inputs["context_input_ids"], inputs["context_attention_mask"]
    assert model.generate(**inputs, **(GREEDY | options)).tolist() == expected.tolist()


@torch.no_grad()
def test_steps_are_alike_for_the_compiler(model):
    """A step whose positions lie in memory in another way than those of the step before is compiled again."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].stride()), with_kwargs=True
    )
    model.generate(**padded("left"), **contexts(), **GREEDY, cache_implementation="static", disable_compile=True)
    hook.remove()
    assert len(seen) > 2
    assert set(seen[1:]) == {(1, 1)}


@torch.no_grad()
def test_assisted_by_another_model_and_by_itself(model):
    row = {"input_ids": torch.tensor(PROMPTS[1:]), **contexts_of_row(1)}
    expected = model.generate(**row, **GREEDY)[0].tolist()
    for assistant in (make_model(seed=5, latent_stride=STRIDE), model):
        found = model.generate(**row, **GREEDY, assistant_model=assistant)[0].tolist()
        # Assisted decoding of transformers 4.57 can overshoot by an accepted candidate.
        assert found[: len(expected)] == expected


@torch.no_grad()
def test_several_sequences_a_prompt(model):
    inputs = padded("left") | contexts()
    expected = model.generate(**inputs, **GREEDY).repeat_interleave(2, dim=0)
    options = GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert model.generate(**inputs, **options).tolist() == expected.tolist()


@torch.no_grad()
def test_a_batch_is_its_rows_and_the_best_beam_scores_as_forward_says(model):
    inputs = padded("left") | contexts()
    together = model.generate(**inputs, **GREEDY)
    row = {name: value[1:] for name, value in inputs.items()}
    assert model.generate(**row, **GREEDY).tolist() == together[1:].tolist()
    del row["attention_mask"]
    assert model.generate(**row, **GREEDY).tolist() == together[1:].tolist()
    assert model.generate(**row, **GREEDY, use_cache=False).tolist() == together[1:].tolist()
    assert model.generate(**row, **GREEDY, prompt_lookup_num_tokens=2).tolist() == together[1:].tolist()
    beams = model.generate(**row, **GREEDY, num_beams=3, output_scores=True, return_dict_in_generate=True)
    length = row["input_ids"].shape[1]
    logits = model(beams.sequences, **contexts_of_row(1)).logits[0, length - 1 : -1]
    chosen = torch.log_softmax(logits, dim=-1).gather(1, beams.sequences[0, length:, None])
    new_tokens = beams.sequences.shape[1] - length
    assert chosen.sum().item() / new_tokens == pytest.approx(beams.sequences_scores[0].item(), abs=1e-3)


def contexts_of_row(row: int) -> dict[str, torch.Tensor]:
    return {name: value[row : row + 1] for name, value in contexts().items()}


@torch.no_grad()
def test_latents_embeddings_and_steps_by_hand(model):
    inputs, given = padded("left"), contexts()
    expected = model.generate(**inputs, **given, **GREEDY)
    latents = model.get_context_features(**given)
    known = {"context_latents": latents, "context_strides": STRIDES}
    # A context that is not there has no place in the prompt, whatever its latents.
    latents[0, 1] = 0
    assert model.generate(**inputs, **known, **GREEDY).tolist() == expected.tolist()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    only = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **given, **GREEDY)
    length = inputs["input_ids"].shape[1]
    assert only.tolist() == expected[:, length:].tolist()
    out = model(**inputs, **given, use_cache=True)
    mask, new_ids = inputs["attention_mask"], []
    for _ in range(GREEDY["max_new_tokens"]):
        new_ids.append(out.logits[:, -1:, :256].argmax(dim=-1))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        out = model(new_ids[-1], attention_mask=mask, past_key_values=out.past_key_values)
    assert torch.cat(new_ids, dim=1).tolist() == expected[:, length:].tolist()


@torch.no_grad()
def test_a_second_turn_on_a_kept_cache(model):
    row = {"input_ids": torch.tensor(PROMPTS[:1])}
    first = contexts_of_row(0)
    first = {name: value[:, :1] for name, value in first.items()}
    out = model.generate(**row, **first, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([out.sequences, torch.tensor([[72, *BLOCK, 73]])], dim=1)
    both = contexts_of_row(1)
    second = {name: torch.cat([first[name], both[name][:, 1:]], dim=1) for name in first}
    fresh = model.generate(longer, **second, **GREEDY)
    kept = model.generate(longer, **second, **GREEDY, past_key_values=out.past_key_values)
    assert kept.tolist() == fresh.tolist()


class TestRowsOfAKeptCache:
    """The cache carries how far its latents have moved each row; rows that leave, move or are doubled keep theirs."""

    NEXT = torch.tensor([[72, 73], [74, 75]])

    @pytest.fixture
    @torch.no_grad()
    def filled(self, model):
        """Behind one context and behind two."""
        inputs = padded("left")
        cache = getattr(model(**inputs, **contexts(), use_cache=True), CACHE_NAME)
        assert cache.position_delta.tolist() == [[16], [32]]
        return inputs["attention_mask"], cache

    @torch.no_grad()
    def step(self, model, filled, change, rows):
        mask, cache = filled[0], copy.deepcopy(filled[1])
        change(cache)
        mask = torch.cat([mask, torch.ones_like(self.NEXT)], dim=1)[rows]
        return model(self.NEXT[rows], attention_mask=mask, **{CACHE_NAME: cache}).logits

    @pytest.mark.parametrize("rows", [[1], [0], [1, 0]])
    def test_rows_are_kept(self, model, filled, rows):
        expected = self.step(model, filled, lambda cache: None, [0, 1])[rows]
        found = self.step(model, filled, lambda cache: keep_rows(cache, torch.tensor(rows)), rows)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        chosen = torch.zeros(2, dtype=torch.bool)
        chosen[rows] = True
        by_mask = self.step(model, filled, lambda cache: keep_rows(cache, chosen), sorted(rows))
        torch.testing.assert_close(by_mask, expected[torch.tensor(rows).argsort()], rtol=1e-3, atol=1e-3)

    def test_rows_are_doubled(self, model, filled):
        rows = [0, 0, 1, 1]
        expected = self.step(model, filled, lambda cache: None, [0, 1])[rows]
        found = self.step(model, filled, lambda cache: cache.batch_repeat_interleave(2), rows)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_other_rows(self, model, filled):
        with pytest.raises(ValueError, match=r"the cache was filled by 2 rows and is used for 1.*`keep_rows"):
            self.step(model, filled, lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])

    @torch.no_grad()
    def test_a_cache_without_latents_has_nothing_to_carry(self, model):
        cache = getattr(model(self.NEXT, use_cache=True), CACHE_NAME)
        keep_rows(cache, torch.tensor([1]))
        found = model(self.NEXT[1:], **{CACHE_NAME: cache}).logits
        expected = model(self.NEXT[1:].repeat(1, 2)).logits[:, 2:]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_beams_on_a_kept_cache(model):
    """The next turn brings no latents; every beam goes on at the positions of its row."""
    row = {"input_ids": torch.tensor(PROMPTS[1:]), **contexts_of_row(1)}
    cache = getattr(model(**row, use_cache=True), CACHE_NAME)
    cache.batch_repeat_interleave(3)
    longer = torch.cat([row["input_ids"], torch.tensor([[72, 73]])], dim=1)
    options = GREEDY | {"num_beams": 3}
    fresh = model.generate(longer, **contexts_of_row(1), **options)
    assert model.generate(longer, **options, **{CACHE_NAME: cache}).tolist() == fresh.tolist()


@torch.no_grad()
def test_contexts_in_line_have_the_stride_of_the_configuration(model):
    text = [10, 11, 12, 13, 14]
    inline = model.generate(torch.tensor([[65, 259, *text, 260, 66]]), **GREEDY)
    tensors = model.generate(torch.tensor([[65, *BLOCK, 66]]), context_input_ids=torch.tensor([[text]]), **GREEDY)
    assert inline[0, -6:].tolist() == tensors[0, -6:].tolist()
    # Rows of several and of one, padded; a static cache, beams.
    rows = torch.tensor([[65, 259, *text, 260, 66, 259, 15, 16, 260], [256] * 6 + [259, *text[:4], 260, 66]])
    mask = (rows != 256).long()
    prompts = torch.tensor([[65, *BLOCK, 66, *BLOCK], [256] * 7 + [*BLOCK, 66]])
    ids = torch.tensor([[text, [15, 16, 0, 0, 0]], [[*text[:4], 0], [0] * 5]])
    given = {"context_input_ids": ids, "context_attention_mask": (ids != 0).long()}
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}):
        inline = model.generate(rows, attention_mask=mask, **GREEDY, **options)
        tensors = model.generate(prompts, attention_mask=(prompts != 256).long(), **given, **GREEDY, **options)
        assert inline[:, -6:].tolist() == tensors[:, -6:].tolist()


@torch.no_grad()
def test_without_a_context_it_is_the_plain_decoder(model):
    decoder = AutoModel.from_config(model.config.text_config).eval()
    decoder.load_state_dict(model.model.language_model.state_dict())
    ids = torch.tensor([[65, 66, 67, 263, 68]])
    torch.testing.assert_close(model.model(ids).last_hidden_state, decoder(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "strides", "message"),
    [
        ({}, [[1]], r"`context_strides` was given, but the latents of this model have no stride"),
        ({"latent_stride": 5}, [[6]], r"must lie between 1 and `config.latent_stride`=5, got \[\[6\]\]"),
        ({"latent_stride": 5}, [[0]], r"must lie between 1 and `config.latent_stride`=5, got \[\[0\]\]"),
        ({"latent_stride": 5}, [[1, 2, 3]], r"must have shape .*here \(1, 1\).*got \(1, 3\)"),
    ],
)
def test_strides_that_do_not_fit(changes, strides, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes).get_context_features(torch.tensor([[10, 11]]), context_strides=torch.tensor(strides))


@pytest.mark.parametrize("stride", [0, -1, 2.5, True])
def test_a_stride_that_is_no_positive_int(stride):
    with pytest.raises(ValueError, match="`latent_stride` must be a positive int or None"):
        make_config(latent_stride=stride)


def test_a_mask_of_four_dimensions_needs_positions(model):
    inputs = {"input_ids": torch.tensor(PROMPTS[:1]), **contexts_of_row(0)}
    with pytest.raises(ValueError, match="`attention_mask` has 4 dimensions and no `position_ids`"):
        model(**inputs, attention_mask=torch.ones(1, 1, 10, 10))
