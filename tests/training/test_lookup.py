"""The losses of the look-up, against re-statements token by token, and inside a run; and its heads, drawn or alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import factories
from c3_hf.training.arguments import parse_recipe
from c3_hf.training.lookup import Lookup, draw_lookup_heads, lookup_loss, previous_loss, train_heads_alone
from c3_hf.training.train import train


PLACEHOLDER = factories.VOCAB_SIZE - 1


def restated(attention, inputs, labels, config, num_places):
    """Loss and counts by loops over rows, positions, heads, contexts and tokens."""
    length, (_, num_heads, kept, _) = labels.shape[1], attention.shape
    looking, away, right = [], [], 0
    for row in range(len(labels)):
        columns = [at for at, token in enumerate(inputs["input_ids"][row].tolist()) if token == PLACEHOLDER]
        crowded = is_crowded(inputs, row, num_places)
        for position in range(length - kept, length - 1):
            if crowded:
                if labels[row, position + 1] != -100:
                    weights = attention[row, :, position - (length - kept)][:, columns].sum(dim=1)
                    away += [-math.log(1 - weight) for weight in weights.tolist()]
                continue
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
                    if (ids[number - 1], ids[number]) == pair and stride <= num_places:
                        for head in range(stride - 1 - number % stride, num_heads, num_places):
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


def is_crowded(inputs, row, num_places):
    masks, strides = inputs["context_attention_mask"][row], inputs["context_strides"][row].tolist()
    return all(stride > num_places for stride, mask in zip(strides, masks) if mask.any())


def previous_restated(attention, inputs, config, num_places):
    missing = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        columns = [at for at, token in enumerate(ids) if token == PLACEHOLDER]
        for slot, stride in enumerate(inputs["context_strides"][row].tolist()):
            count = int(inputs["context_attention_mask"][row, slot].sum())
            block = columns[slot * config.num_latents : (slot + 1) * config.num_latents]
            for number, column in enumerate(block[: -(-count // stride)]):
                for weights in attention[row, :, column]:
                    if is_crowded(inputs, row, num_places):
                        missing.append(-math.log(1 - weights[columns].sum()))
                    elif number:
                        missing.append(-math.log(weights[column - 1]))
    return sum(missing) / len(missing)


@pytest.fixture
def batch():
    config = factories.make_model(latent_stride=3).config
    generator = torch.Generator().manual_seed(0)
    # Few different tokens, so that pairs stand in several places, at the ends of stretches and in both contexts.
    contexts = torch.randint(0, 4, (3, 2, 9), generator=generator)
    mask = torch.ones_like(contexts)
    mask[0, 1, 5:], mask[1, 0, 8:], mask[2, 0, 4:], mask[2, 1] = 0, 0, 0, 0
    strides = torch.tensor([[3, 3], [2, 3], [1, 1]])
    block = torch.full((3, 2 * config.num_latents), PLACEHOLDER)
    block[2, config.num_latents :] = 7
    replies = torch.randint(0, 4, (3, 30), generator=generator)
    ids = torch.cat([torch.full((3, 2), 9), block, torch.full((3, 1), 9), replies], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -30:] = replies
    inputs = {"input_ids": ids, "context_input_ids": contexts, "context_attention_mask": mask}
    inputs["context_strides"] = strides
    return config, inputs, labels, generator


@pytest.mark.parametrize("num_places", [3, 2, 1])
def test_it_is_the_attention_on_the_latents_of_the_next_token_wherever_the_two_stand_in_a_context(num_places, batch):
    config, inputs, labels, generator = batch
    scores = torch.randn(3, 3, 31, labels.shape[1], generator=generator, requires_grad=True)
    attention = scores.softmax(dim=-1)
    loss, counts = lookup_loss(attention, inputs, labels, config, num_places)
    expected, right = restated(attention, inputs, labels, config, num_places)
    assert right[1] > 8
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == right
    loss.backward()
    assert scores.grad.abs().max() > 0


@pytest.mark.parametrize("num_places", [3, 2, 1])
def test_a_latent_looks_at_the_one_before_where_it_stands_for_few_tokens_and_at_none_elsewhere(num_places, batch):
    config, inputs, labels, generator = batch
    length = labels.shape[1]
    scores = torch.randn(3, 2, length, length, generator=generator, requires_grad=True)
    attention = scores.softmax(dim=-1)
    loss = previous_loss(attention, inputs, config, num_places)
    expected = previous_restated(attention.detach(), inputs, config, num_places)
    torch.testing.assert_close(loss.item(), float(expected), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert scores.grad.abs().max() > 0
    nothing = {**inputs, "context_attention_mask": torch.zeros_like(inputs["context_attention_mask"])}
    assert previous_loss(attention, nothing, config, num_places).item() == 0


def test_a_restored_text_is_found_by_its_distance_and_asked_for_nowhere():
    config = factories.make_model(latent_stride=3).config
    context = torch.tensor([[[1, 2, 3, 1, 2, 4]]])
    ids = torch.tensor([[9, *[PLACEHOLDER] * config.num_latents, 9, 1, 2, 3, 1, 2, 4]])
    labels = ids.where(torch.arange(ids.shape[1]) > config.num_latents + 1, -100)
    inputs = {"input_ids": ids, "context_input_ids": context, "context_strides": torch.tensor([[2]])}
    inputs["context_attention_mask"] = torch.ones_like(context)
    attention = torch.full((1, 2, 7, ids.shape[1]), 1 / ids.shape[1])
    assert lookup_loss(attention, inputs, labels, config, 2)[1].tolist() == [0, 0]
    # The same words from the third on.
    inputs["input_ids"], labels = ids[:, [*range(config.num_latents + 2), -4, -3, -2, -1]], labels[:, :-2]
    labels = torch.cat([labels[:, :-4], torch.tensor([[3, 1, 2, 4]])], dim=1)
    assert lookup_loss(attention[:, :, :5, :-2], inputs, labels, config, 2)[1][1] > 0


def test_where_no_pair_stands_in_a_context_it_is_nothing():
    config = factories.make_model(latent_stride=3).config
    ids = torch.tensor([[9, *[PLACEHOLDER] * config.num_latents, 1, 2]])
    inputs = {"input_ids": ids, "context_input_ids": torch.tensor([[[2, 1]]])}
    inputs |= {"context_attention_mask": torch.ones(1, 1, 2), "context_strides": torch.tensor([[1]])}
    loss, counts = lookup_loss(torch.rand(1, 2, 3, ids.shape[1]), inputs, ids, config, 2)
    assert float(loss) == 0
    assert counts.tolist() == [0, 0]


def test_heads_of_another_layout_are_not_drawn():
    gpt2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 4, "n_embd": 32, "vocab_size": factories.VOCAB_SIZE}
    model = factories.make_model(text_config=gpt2, latent_stride=3)
    with pytest.raises(ValueError, match=r"`draw_lookup_heads` knows .* of the type 'gpt2' has none"):
        draw_lookup_heads(model, {0: [1]})
    with pytest.raises(ValueError, match=r"`lookup_heads_alone` knows .* of the type 'gpt2' has none"):
        train_heads_alone(model, {0: [1]})


def test_tensors_that_processes_divide_have_no_heads_alone(monkeypatch):
    monkeypatch.setattr("c3_hf.training.lookup.is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="`lookup_heads_alone` cuts gradients of whole tensors, which FSDP"):
        train_heads_alone(factories.make_model(latent_stride=3), {0: [1]})


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


def test_what_heads_say_where_they_are_to_be_quiet_is_their_share_of_their_layers_attention(
    recipe, write_recipe, batch
):
    _, inputs, labels, _ = batch
    recipe |= {"lookup_weight": 1.0, "lookup_heads": {1: [0, 3]}, "lookup_places": 2, "previous_heads": {0: [1]}}
    _, _, arguments = parse_recipe(write_recipe({**recipe, "quiet_weight": 3.0}))
    model = factories.make_model(latent_stride=3, attn_implementation="eager")
    model.train()
    half = model.model.language_model
    inputs["attention_mask"] = torch.ones_like(labels)
    inputs["attention_mask"][0, :2] = 0
    losses, states = [], []
    for weight in (0.0, 3.0):
        arguments.quiet_weight = weight
        lookup = Lookup(model, arguments)
        heard = [
            layer.self_attn.o_proj.register_forward_hook(lambda *call: states.append(call)) for layer in half.layers
        ]
        outputs = model(**inputs, labels=labels, output_attentions=True)
        losses.append(lookup.loss(outputs.attentions, inputs, labels, labels.shape[1])[0])
        lookup.detach()
        for hook in heard:
            hook.remove()
    assert not any(layer.self_attn.o_proj._forward_hooks for layer in half.layers)
    expected = 0.0
    for (projection, (state,), output), heads in zip(states[2:], ([1], [0, 3])):
        without = state.clone().unflatten(-1, (4, 8))
        without[:, :, heads] = 0
        share = (output - projection(without.flatten(2))).norm(dim=-1) / output.norm(dim=-1)
        # Both contexts of the first row alone hold three tokens a latent.
        expected += share[0, 2:].mean()
    torch.testing.assert_close(losses[1] - losses[0], 3 * expected, rtol=1e-4, atol=1e-4)
    losses[1].backward()
    assert half.layers[1].self_attn.v_proj.weight.grad.abs().max() > 0


def test_heads_alone_change_and_nothing_beside_them(write_recipe, recipe, tmp_path):
    torch.manual_seed(0)
    start = str(tmp_path / "start")
    factories.make_model(latent_stride=16).save_pretrained(start)
    factories.make_processor().save_pretrained(start)
    for name in ("tokenizer_path", "text_config", "encoder_config"):
        del recipe[name]
    recipe |= {"model_name_or_path": start, "attn_implementation": "eager", "weight_decay": 0.0, "max_steps": 30}
    recipe |= {"tasks": {"pieces": 1.0}, "min_context_tokens": 5, "context_ceiling": [[0, 8]], "learning_rate": 1e-2}
    recipe |= {"lookup_weight": 5.0, "lookup_heads": {1: [0, 2, 3]}, "lookup_places": 2, "previous_heads": {0: [1]}}
    recipe |= {"stride_ceiling": [[0, 2]], "save_strategy": "no", "logging_steps": 10}
    train(*parse_recipe(write_recipe({**recipe, "lookup_heads_alone": True})))
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (start, tmp_path / "run"))
    assert set(before) == set(after)
    # Heads 2 and 3 of a layer share a key, 0 and 1 have theirs with each other.
    heads = {("0", "q_proj"): [1], ("0", "o_proj"): [1]}
    heads |= {("1", "q_proj"): [0, 2, 3], ("1", "o_proj"): [0, 2, 3], ("1", "k_proj"): [1], ("1", "v_proj"): [1]}
    for name, value in after.items():
        changed = value != before[name]
        layer, _, rest = name.removeprefix("model.language_model.layers.").partition(".self_attn.")
        projection = rest.partition(".")[0]
        for head in heads.get((layer, projection), []):
            part = changed.narrow(int(projection == "o_proj"), head * 8, 8)
            assert part.any(), name
            part.fill_(False)
        assert not changed.any(), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"lora": ["encoder", "decoder"]}],
    ids=["whole", "checkpointing", "lora"],
)
def test_a_run_teaches_its_heads(write_recipe, recipe, options, tmp_path):
    if "lora" in options:
        pytest.importorskip("peft")
    recipe |= {"latent_stride": 8, "attn_implementation": "eager", "max_steps": 40, **options}
    recipe |= {"save_strategy": "no"}
    recipe |= {
        "lookup_weight": 5.0,
        "lookup_heads": {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]},
        "draw_lookup_heads": {0: [1, 2]},
        "logging_steps": 10,
        "learning_rate": 1e-2,
    }
    recipe |= {"stride_ceiling": [[0, 8]], "asking_stride_ceiling": [[0, 8]]} if not options else {}
    # Some words at the least: a text of one piece is a restored one.
    recipe |= {"tasks": {"pieces": 0.9, "restore": 0.1}, "min_context_tokens": 24, "context_ceiling": [[0, 32]]}
    train(*parse_recipe(write_recipe(recipe)))
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses, accuracies = zip(*((entry["loss"], entry["lookup_accuracy"]) for entry in entries if "loss" in entry))
    assert len(accuracies) == 4
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    # Nearly all of it is the look-up's, five times.
    assert losses[-1] < 0.8 * losses[0]


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
        ({"previous_heads": {0: [0]}}, "`previous_heads` is .*, got `lookup_weight` 1.0 and `lookup_places` None"),
        (
            {"previous_heads": {0: [0]}, "lookup_places": 1},
            r"`previous_heads` must lie in layers below those of `lookup_heads`, \[0\], .*, got \[0\]",
        ),
        (
            {"previous_heads": {0: [4]}, "lookup_heads": {1: [1]}, "lookup_places": 1},
            r"`previous_heads` must name heads of the decoder by their layers.*, got \{0: \[4\]\}",
        ),
        ({"quiet_weight": -1.0}, "`quiet_weight` must not be negative, got -1.0"),
        ({"quiet_weight": 1.0, "lookup_weight": 0.0}, r"`quiet_weight` is 1\.0 and `lookup_weight` is 0"),
        ({"lookup_heads_alone": True, "weight_decay": 0.1}, r"`lookup_heads_alone` needs .*, got 1\.0 and 0\.1"),
        ({"lookup_heads_alone": True, "lookup_weight": 0.0}, r"`lookup_heads_alone` needs .*, got 0\.0 and 0\.0"),
        (
            {"lookup_heads_alone": True, "freeze": ["encoder"]},
            "`lookup_heads_alone` keeps all .* `freeze`, `freeze_modules` and `lora` have nothing to say beside it",
        ),
    ],
)
def test_wrong_settings_are_refused(write_recipe, recipe, options, message):
    recipe |= {"latent_stride": 4, "attn_implementation": "eager", "lookup_weight": 1.0, "lookup_heads": {0: [1]}}
    with pytest.raises(ValueError, match=message):
        train(*parse_recipe(write_recipe({**recipe, **options})))
