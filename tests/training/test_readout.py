"""The read-out loss, against a re-statement token by token, and inside a run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import factories
from c3_hf.data.lengths import LengthGroupedBatches, LengthSchedule
from c3_hf.training.arguments import parse_recipe
from c3_hf.training.losses import LatentReadout
from c3_hf.training.train import train


@pytest.fixture
def model():
    return factories.make_model(latent_stride=3).model


def test_the_loss_names_the_tokens_of_each_stretch_from_its_end(model):
    readout = LatentReadout(model)
    ids = torch.randint(0, 250, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = 0
    strides = torch.tensor([[3, 1], [2, 3]])
    latents = torch.randn(2, 2, 4, 32)
    table = model.encoder.embed_tokens.weight
    loss, counts = readout(latents, table, ids, mask, strides)
    losses, right = [], 0
    for row in range(2):
        for slot in range(2):
            stride = int(strides[row, slot])
            for position in range(int(mask[row, slot].sum())):
                latent, place = position // stride, stride - 1 - position % stride
                if latent >= 4:
                    continue
                rows = slice(place * 24, (place + 1) * 24)
                read = readout.heads.weight[rows] @ latents[row, slot, latent] + readout.heads.bias[rows]
                logits = table @ functional.layer_norm(read, (24,))
                target = ids[row, slot, position]
                losses.append(functional.cross_entropy(logits, target))
                right += int(logits.argmax() == target)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    assert counts.tolist() == [right, len(losses)]


def test_candidates_are_the_words_of_the_batch_and_some_drawn_ones(model):
    readout = LatentReadout(model, candidates=50)
    table = model.encoder.embed_tokens.weight
    ids = torch.randint(0, 250, (8, 1, 12), generator=torch.Generator().manual_seed(0))
    inputs = (torch.randn(8, 1, 4, 32), table, ids, torch.ones_like(ids), torch.full((8, 1), 3))
    torch.manual_seed(3)
    loss, counts = readout(*inputs)
    torch.manual_seed(3)
    words = sorted({*ids.flatten().tolist(), *torch.randint(len(table), (50,)).tolist()})
    whole, expected = LatentReadout(model), []
    whole.load_state_dict(readout.state_dict())
    for row in range(8):
        for latent in range(4):
            for place in range(3):
                rows = slice(place * 24, (place + 1) * 24)
                read = readout.heads.weight[rows] @ inputs[0][row, 0, latent] + readout.heads.bias[rows]
                logits = table[words] @ functional.layer_norm(read, (24,))
                target = words.index(int(ids[row, 0, latent * 3 + 2 - place]))
                expected.append(functional.cross_entropy(logits, torch.tensor(target)))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)
    assert counts[1] == 8 * 12
    assert loss < whole(*inputs)[0]


def test_a_model_without_a_stride_has_no_read_out():
    with pytest.raises(ValueError, match="`readout_weight` needs a model with `latent_stride`"):
        LatentReadout(factories.make_model().model)


def test_it_is_given_once(model):
    with pytest.raises(RuntimeError, match="No batch of contexts has gone through"):
        LatentReadout(model).take()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"lora": ["encoder", "decoder"]}, marks=pytest.mark.slow)], ids=["whole", "lora"]
)
def test_a_run_learns_the_heads_resumes_with_them_and_leaves_them_out(write_recipe, recipe, options, tmp_path):
    if options:
        pytest.importorskip("peft")
    recipe |= {"latent_stride": 4, "readout_weight": 1.0, "readout_candidates": 20, **options}
    whole = train(*parse_recipe(write_recipe(recipe)))
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0 <= entry["readout_accuracy"] <= 1 for entry in entries if "loss" in entry)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert not [name for name in saved if "readout" in name]
    assert (tmp_path / "run" / "checkpoint-4" / "readout.safetensors").is_file()
    # Resumed after step 2, it ends where the whole run ended.
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run" / "checkpoint-2", other / "checkpoint-2")
    recipe["output_dir"] = str(other)
    resumed = train(*parse_recipe(write_recipe(recipe)))
    heads = [trainer._readout.heads.weight for trainer in (whole, resumed)]
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)
    for name, value in load_file(other / "model.safetensors").items():
        torch.testing.assert_close(value, saved[name], rtol=1e-3, atol=1e-4)


def test_strides_reach_the_ceiling_and_low_ones_are_seen_as_often_as_high_ones():
    schedule = LengthSchedule(8, [(0, 128)], num_latents=32)
    strides = [schedule.stride_at(step) for step in range(400)]
    assert set(strides) == {1, 2, 3, 4}
    assert 210 < strides.count(4) < 290
    assert min(strides.count(stride) for stride in (1, 2, 3)) > 30
    # What the latents hold at the stride of a step bounds its length.
    assert all(schedule.length_at(step) <= 32 * stride for step, stride in enumerate(strides))
    assert max(schedule.length_at(step) for step in range(400)) > 100
    few = LengthSchedule(8, [(0, 32)], multiple=4, num_latents=4)
    assert min(few.length_at(step) for step in range(50)) == 8
    schedule = LengthSchedule(8, [(0, 128), (400, 640)], num_latents=32)
    assert max(schedule.stride_at(step) for step in range(400, 600)) == 20


def test_strides_can_grow_while_lengths_stay():
    schedule = LengthSchedule(8, [(0, 32)], num_latents=32, stride_ceiling=[(0, 1), (100, 11)])
    assert schedule.stride_at(0) == 1
    assert max(schedule.stride_at(step) for step in range(45, 50)) == 5
    assert max(schedule.stride_at(step) for step in range(100, 200)) == 11
    assert max(schedule.length_at(step) for step in range(200)) == 32


def test_the_share_of_low_strides_follows_its_curve():
    options = {"num_latents": 32, "stride_ceiling": [(0, 10)], "low_stride_share": [(0, 0.0), (100, 0.0), (101, 1.0)]}
    schedule = LengthSchedule(8, [(0, 320)], **options)
    assert {schedule.stride_at(step) for step in range(101)} == {10}
    assert {schedule.stride_at(step) for step in range(101, 400)} == set(range(1, 11))


def test_steps_that_ask_stay_below_their_own_ceiling():
    options = {"num_latents": 32, "low_stride_share": [(0, 0.0), (99, 0.0), (100, 0.6)]}
    schedule = LengthSchedule(
        8, [(0, 640)], asking_share=0.3, asking_stride_ceiling=[(0, 2), (100, 2), (300, 4)], **options
    )
    asks = [schedule.asks_at(step) for step in range(1000)]
    assert 250 < sum(asks) < 350
    strides = [schedule.stride_at(step) for step in range(1000)]
    assert {stride for stride, asking in zip(strides[:100], asks) if not asking} == {20}
    assert {stride for stride, asking in zip(strides[:100], asks) if asking} == {2}
    later = [stride for stride, asking in zip(strides[300:], asks[300:]) if asking]
    assert set(later) == {1, 2, 3, 4}
    assert 0.45 < later.count(4) / len(later) < 0.65
    assert all(schedule.length_at(step) <= 32 * stride for step, stride in enumerate(strides))
    assert [schedule.rises_at(step) for step in (50, 100, 299, 300)] == [False, True, True, False]
    batches = list(LengthGroupedBatches(schedule, 20, 1, batch_size=3))
    assert [[key.asks for key in batch] for batch in batches] == [[asking] * 3 for asking in asks[:20]]
    # The other steps are those of a run that does not tell them apart, which leaves the task to each sample.
    alike = LengthSchedule(8, [(0, 640)], **options)
    others = [(alike.stride_at(step), alike.length_at(step)) for step in range(1000) if not asks[step]]
    assert others == [(strides[step], schedule.length_at(step)) for step in range(1000) if not asks[step]]
    assert alike.asks_at(0) is None


def test_a_share_of_the_lengths_fills_the_block():
    rng = np.random.default_rng(0)

    def full(share: float) -> tuple[float, float]:
        schedule = LengthSchedule(8, [(0, 640)], num_latents=32, long_share=1.0, full_share=share)
        steps = [(schedule.length_at(step), 32 * schedule.stride_at(step)) for step in range(600)]
        samples = [(schedule.draw(rng, length), most) for length, most in steps]
        assert all(drawn <= most for drawn, most in samples)
        return tuple(sum(length == most for length, most in pairs) / 600 for pairs in (steps, samples))

    # Without one, a block is filled by the sixteenth part of the lengths that are rounded up to it.
    assert full(0.0)[1] < 0.04
    of_steps, of_samples = full(0.6)
    assert of_steps > 0.6
    assert 0.35 < of_samples < 0.5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"lora": ["encoder", "decoder"]}], ids=["whole", "lora"])
def test_until_its_start_the_decoder_stays_as_it_was(write_recipe, recipe, options, tmp_path):
    if options:
        pytest.importorskip("peft")
    recipe |= {"latent_stride": 4, "readout_weight": 1.0, "decoder_start": 4, "weight_decay": 0.0, **options}
    recipe |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 9, "logging_steps": 1}
    trainer = train(*parse_recipe(write_recipe(recipe)))
    states = [load_file(next((tmp_path / "run" / f"checkpoint-{n}").glob("*model.safetensors"))) for n in (2, 4, 6)]
    for part, moves in (("language_model", (False, True)), ("encoder.", (True, True))):
        for before, after, moved in zip(states, states[1:], moves):
            same = [torch.equal(before[name], after[name]) for name in before if part in name]
            assert same
            assert all(same) is not moved
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [any("accuracy_to" in name for name in entry) for entry in losses] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride_ceiling": [(0, 1)]}, "`stride_ceiling` was given, but the latents of this model have no stride"),
        ({"low_stride_share": [(0, 1.5)]}, r"`low_stride_share` must be .* shares of 0 to 1, got \[\(0, 1.5\)\]"),
        ({"low_stride_share": [(5, 0.5), (5, 0.1)]}, r"`low_stride_share` must be .* rising steps"),
        ({"stride_ceiling": [(0, 0)], "num_latents": 4}, r"`stride_ceiling` must be .* numbers of at least 1"),
        ({"asking_stride_ceiling": [(0, 1)]}, "`asking_stride_ceiling` was given, but the latents of this model have"),
        (
            {"asking_stride_ceiling": [(0, 0)], "num_latents": 4},
            r"`asking_stride_ceiling` must be .* numbers of at least 1",
        ),
        ({"stride_ceiling": [(5, 2), (5, 3)], "num_latents": 4}, r"`stride_ceiling` must be .* rising steps"),
    ],
)
def test_wrong_strides_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LengthSchedule(8, [(0, 32)], **options)


def test_a_schedule_without_strides_draws_none():
    with pytest.raises(TypeError, match="`num_latents` is None: only a schedule for latents with a stride"):
        LengthSchedule(8, [(0, 128)]).stride_at(0)
