"""The look-up loss, against a re-statement token by token, and inside a run; and the read-out of tokens in front."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import factories
from c3_hf.training.arguments import ModelArguments, parse_recipe
from c3_hf.training.losses import LatentReadout, lookup_loss
from c3_hf.training.model import blend_weights, draw_lookup_heads, prepare_model
from c3_hf.training.train import train


PLACEHOLDER = factories.VOCAB_SIZE - 1


def restated(attention, inputs, labels, config, num_places):
    """Loss and counts by loops over rows, positions, heads, contexts and tokens."""
    length, (_, num_heads, kept, _) = labels.shape[1], attention.shape
    looking, away, right = [], [], 0
    for row in range(len(labels)):
        columns = [at for at, token in enumerate(inputs["input_ids"][row].tolist()) if token == PLACEHOLDER]
        for position in range(length - kept, length - 1):
            pair = (int(inputs["input_ids"][row, position]), int(labels[row, position + 1]))
            whole = [
                token
                for ids, kept_ids in zip(inputs["context_input_ids"][row], inputs["context_attention_mask"][row])
                for token in ids[kept_ids.bool()].tolist()
            ]
            in_reply = int((labels[row, : position + 1] != -100).sum())
            if in_reply and in_reply < len(whole) and (whole[in_reply - 1], whole[in_reply]) == pair:
                continue
            wanted = [set() for _ in range(num_heads)]
            for slot, stride in enumerate(inputs["context_strides"][row].tolist()):
                count = int(inputs["context_attention_mask"][row, slot].sum())
                ids = inputs["context_input_ids"][row, slot, :count].tolist()
                for number in range(1, count):
                    if (ids[number - 1], ids[number]) == pair:
                        place = (stride - 1 - number % stride) % num_places
                        for head in range(place, num_heads, num_places):
                            wanted[head].add(slot * config.num_latents + number // stride)
            if not any(wanted):
                continue
            for head, latents in enumerate(wanted):
                weights = attention[row, head, position - (length - kept)][columns].tolist()
                if latents:
                    looking.append(-math.log(sum(weights[number] for number in latents)))
                    right += weights.index(max(weights)) in latents
                else:
                    away.append(-math.log(1 - sum(weights)))
    return sum(looking) / len(looking) + sum(away) / max(1, len(away)), [right, len(looking)]


@pytest.mark.parametrize("num_places", [None, 3, 2, 1])
def test_it_is_the_attention_on_the_latents_of_the_next_token_wherever_the_two_stand_in_a_context(num_places):
    config = factories.make_model(latent_stride=3).config
    generator = torch.Generator().manual_seed(0)
    # Few different tokens, so that pairs stand in several places, at the ends of stretches and in both contexts.
    contexts = torch.randint(0, 4, (3, 2, 9), generator=generator)
    mask = torch.ones_like(contexts)
    mask[0, 1, 5:], mask[2, 1] = 0, 0
    strides = torch.tensor([[3, 3], [3, 3], [3, 1]])
    block = torch.full((3, 2 * config.num_latents), PLACEHOLDER)
    block[2, config.num_latents :] = 7
    replies = torch.randint(0, 4, (3, 10), generator=generator)
    ids = torch.cat([torch.full((3, 2), 9), block, torch.full((3, 1), 9), replies], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -10:] = replies
    inputs = {"input_ids": ids, "context_input_ids": contexts, "context_attention_mask": mask}
    inputs["context_strides"] = strides
    scores = torch.randn(3, 3, 11, ids.shape[1], generator=generator, requires_grad=True)
    attention = scores.softmax(dim=-1)
    loss, counts = lookup_loss(attention, inputs, labels, config, num_places)
    expected, right = restated(attention, inputs, labels, config, num_places or 3)
    assert right[1] > 8
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == right
    loss.backward()
    assert scores.grad.abs().max() > 0


def test_a_restored_text_is_found_by_its_distance_and_asked_for_nowhere():
    config = factories.make_model(latent_stride=3).config
    context = torch.tensor([[[1, 2, 3, 1, 2, 4]]])
    ids = torch.tensor([[9, *[PLACEHOLDER] * config.num_latents, 9, 1, 2, 3, 1, 2, 4]])
    labels = ids.where(torch.arange(ids.shape[1]) > config.num_latents + 1, -100)
    inputs = {"input_ids": ids, "context_input_ids": context, "context_strides": torch.tensor([[2]])}
    inputs["context_attention_mask"] = torch.ones_like(context)
    attention = torch.full((1, 2, 7, ids.shape[1]), 1 / ids.shape[1])
    assert lookup_loss(attention, inputs, labels, config)[1].tolist() == [0, 0]
    # The same words from the third on.
    inputs["input_ids"], labels = ids[:, [*range(config.num_latents + 2), -4, -3, -2, -1]], labels[:, :-2]
    labels = torch.cat([labels[:, :-4], torch.tensor([[3, 1, 2, 4]])], dim=1)
    assert lookup_loss(attention[:, :, :5, :-2], inputs, labels, config)[1][1] > 0


def test_where_no_pair_stands_in_a_context_it_is_nothing():
    config = factories.make_model(latent_stride=3).config
    ids = torch.tensor([[9, *[PLACEHOLDER] * config.num_latents, 1, 2]])
    inputs = {"input_ids": ids, "context_input_ids": torch.tensor([[[2, 1]]])}
    inputs |= {"context_attention_mask": torch.ones(1, 1, 2), "context_strides": torch.tensor([[1]])}
    loss, counts = lookup_loss(torch.rand(1, 2, 3, ids.shape[1]), inputs, ids, config)
    assert float(loss) == 0
    assert counts.tolist() == [0, 0]


def test_a_latent_names_tokens_in_front_of_its_stretch_too():
    model = factories.make_model(latent_stride=3).model
    readout = LatentReadout(model, before=2)
    ids = torch.randint(0, 250, (2, 1, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 0, 5:] = 0
    strides, latents = torch.tensor([[3], [2]]), torch.randn(2, 1, 4, 32)
    table = model.encoder.embed_tokens.weight
    loss, counts = readout(latents, table, ids, mask, strides)
    losses = []
    for row, stride in enumerate((3, 2)):
        length = int(mask[row].sum())
        for latent in range(-(-length // stride)):
            end = (latent + 1) * stride
            for position in range(max(0, end - stride - 2), min(end, length)):
                rows = slice((end - 1 - position) * 24, (end - position) * 24)
                read = readout.heads.weight[rows] @ latents[row, 0, latent] + readout.heads.bias[rows]
                logits = table @ functional.layer_norm(read, (24,))
                losses.append(functional.cross_entropy(logits, ids[row, 0, position]))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    assert int(counts[1]) == len(losses)


def test_heads_of_another_layout_are_not_drawn():
    gpt2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 4, "n_embd": 32, "vocab_size": factories.VOCAB_SIZE}
    model = factories.make_model(text_config=gpt2, latent_stride=3)
    with pytest.raises(ValueError, match=r"`draw_lookup_heads` knows .* of the type 'gpt2' has none"):
        draw_lookup_heads(model, {0: [1]})
    with pytest.raises(ValueError, match=r"`blend_path` knows .* of the type 'gpt2' has none"):
        blend_weights(model, model, 0.5, {0: [1]})


def test_its_heads_are_drawn_anew_and_the_others_stay():
    model = factories.make_model(latent_stride=3, attn_implementation="eager")
    layers = [layer.self_attn for layer in model.model.language_model.layers]
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    before = []
    for layer in layers:
        for name in names[:3]:
            torch.nn.init.ones_(getattr(layer, name).bias)
        before.append({name: getattr(layer, name).weight.clone() for name in names})
    # Heads 2 and 3 share a key, 0 shares its own with 1, which stays.
    draw_lookup_heads(model, {1: [0, 2, 3]})

    def changed(number, name, count, dim=0):
        pairs = zip(before[number][name].chunk(count, dim), getattr(layers[number], name).weight.chunk(count, dim))
        return [not old.equal(new) for old, new in pairs]

    assert changed(1, "q_proj", 4) == [True, False, True, True]
    assert changed(1, "k_proj", 2) == changed(1, "v_proj", 2) == [False, True]
    assert changed(1, "o_proj", 4, dim=1) == [True, False, True, True]
    assert [part.eq(0).all() for part in layers[1].o_proj.weight.chunk(4, 1)] == [True, False, True, True]
    assert layers[1].q_proj.bias.view(4, -1).amax(dim=1).tolist() == [0, 1, 0, 0]
    assert layers[1].k_proj.bias.view(2, -1).amax(dim=1).tolist() == [1, 0]
    assert not any(any(changed(0, name, 4, int(name == "o_proj"))) for name in names)


def test_blended_weights_lie_in_between_and_heads_of_the_look_up_come_whole(tmp_path):
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = factories.make_model(latent_stride=3)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        folders.append(str(tmp_path / str(seed)))
        model.save_pretrained(folders[-1])
        factories.make_processor().save_pretrained(folders[-1])
    before, other = (load_file(f"{folder}/model.safetensors") for folder in folders)
    arguments = ModelArguments(
        model_name_or_path=folders[0], blend_path=folders[1], blend_share=0.25, attn_implementation="eager"
    )
    # Heads 2 and 3 share a key, 0 shares its own with 1.
    model, _ = prepare_model(arguments, lookup_heads={1: [0, 2, 3]})
    size = model.config.text_config.head_dim
    blended = dict(model.named_parameters())
    assert set(blended) == set(before)
    for name, value in blended.items():
        expected = before[name] * 0.75 + other[name] * 0.25
        projection = name.removeprefix("model.language_model.layers.1.self_attn.").partition(".")[0]
        heads = {"q_proj": [0, 2, 3], "k_proj": [1], "v_proj": [1], "o_proj": [0, 2, 3]}.get(projection, [])
        for head in heads:
            part = slice(head * size, (head + 1) * size)
            if projection == "o_proj":
                expected[:, part] = other[name][:, part]
            else:
                expected[part] = other[name][part]
        torch.testing.assert_close(value.data, expected)


def test_weights_of_another_layout_are_not_blended(monkeypatch, model_path):
    models = [factories.make_model(latent_stride=3, num_latents=count) for count in (4, 5)]
    with pytest.raises(ValueError, match="`blend_path` must be a checkpoint of the same layout as `model_name"):
        blend_weights(*models, 0.5, {})
    with pytest.raises(ValueError, match=r"`blend_share` must lie between 0 and 1, got 1\.5"):
        ModelArguments(model_name_or_path="a", blend_path="b", blend_share=1.5)
    with pytest.raises(ValueError, match="`blend_path` is 'b', and there is no `model_name_or_path` to blend it with"):
        ModelArguments(blend_path="b")
    monkeypatch.setattr("c3_hf.training.model.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="`blend_path` cannot be used under DeepSpeed ZeRO-3"):
        prepare_model(ModelArguments(model_name_or_path=model_path, blend_path=model_path))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"lora": ["encoder", "decoder"]}],
    ids=["whole", "checkpointing", "lora"],
)
def test_a_run_teaches_its_heads(write_recipe, recipe, options, tmp_path):
    if "lora" in options:
        pytest.importorskip("peft")
    recipe |= {"latent_stride": 16, "attn_implementation": "eager", "max_steps": 40, "save_strategy": "no", **options}
    recipe |= {
        "lookup_weight": 5.0,
        "lookup_heads": {0: [1, 2]},
        "draw_lookup_heads": {0: [1, 2]},
        "logging_steps": 10,
        "learning_rate": 1e-2,
    }
    recipe |= {"stride_ceiling": [[0, 16]], "asking_stride_ceiling": [[0, 16]]} if not options else {}
    # Some words at the least: a text of one piece is a restored one.
    recipe |= {"tasks": {"pieces": 0.9, "restore": 0.1}, "min_context_tokens": 48, "context_ceiling": [[0, 64]]}
    train(*parse_recipe(write_recipe(recipe)))
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    accuracies = [entry["lookup_accuracy"] for entry in entries if "loss" in entry]
    assert len(accuracies) == 4
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert accuracies[-1] > accuracies[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_stride": None}, "`lookup_weight` needs a model with `latent_stride`"),
        ({"lookup_heads": {}}, r"`lookup_heads` must name heads of the decoder by their layers.*, got \{\}"),
        ({"lookup_heads": {0: [4]}}, r"it has 4 in each of 2 layers, counted from 0, got \{0: \[4\]\}"),
        ({"lookup_heads": {2: [0]}}, r"`lookup_heads` must name heads.*, got \{2: \[0\]\}"),
        ({"attn_implementation": "sdpa"}, "`lookup_weight` reads the weights .* which sdpa attention does not return"),
        ({"lookup_places": 2}, "`lookup_places` must lie between 1 and the number of `lookup_heads`, 1, got 2"),
        ({"lookup_places": 0}, "`lookup_places` must lie between 1 and the number of `lookup_heads`, 1, got 0"),
        ({"lookup_weight": 0.0, "draw_lookup_heads": {0: [1]}}, "`draw_lookup_heads` is set and `lookup_weight` is 0"),
        (
            {"draw_lookup_heads": {0: [1, 2]}},
            r"may name heads that `lookup_heads` names, \{0: \[1\]\}, got \{0: \[1, 2",
        ),
        ({"lookup_weight": -1.0}, "`lookup_weight` must not be negative, got -1.0"),
        ({"readout_before": -1}, "`readout_before` must not be negative, got -1"),
    ],
)
def test_wrong_settings_are_refused(write_recipe, recipe, options, message):
    recipe |= {"latent_stride": 4, "attn_implementation": "eager", "lookup_weight": 1.0, "lookup_heads": {0: [1]}}
    with pytest.raises(ValueError, match=message):
        train(*parse_recipe(write_recipe({**recipe, **options})))
