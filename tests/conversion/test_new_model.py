"""New C3 models from pairs of tiny language models, and changes to existing ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from c3_hf.cli import main
from c3_hf.conversion import new_model as marker_tokens
from c3_hf.conversion.export import export
from c3_hf.conversion.new_model import from_encoder_decoder_pretrained as make_model
from c3_hf.conversion.new_model import replace_halves, resize_latents
from c3_hf.conversion.repository import load_model, save_model


FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma3_text")


def train_a_little(model, processor) -> list[float]:
    inputs = processor.apply_chat_template(processor.restore_messages("the cat sat"), add_generation_prompt=True)
    labels = inputs["input_ids"].clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert model.model.latent_queries.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [*((family, family) for family in FAMILIES), ("qwen2", "llama"), ("gemma3_text", "mistral"), ("llama", "gemma")],
)
def test_a_pair_becomes_a_model_that_loads_and_learns(pairs, tmp_path, encoder, decoder):
    decoder_folder = pairs(decoder)
    made = make_model(pairs(encoder, hidden_size=24, num_attention_heads=2), decoder_folder, num_latents=3)
    assert made.shared_vocabulary
    save_model(made.model, made.processor, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.num_latents == processor.num_latents == 3
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # Without a context it is the decoder it was made from.
    plain = AutoModelForCausalLM.from_pretrained(decoder_folder)
    ids = processor.tokenizer("the dog lay", return_tensors="pt")["input_ids"]
    size = plain.config.vocab_size
    torch.testing.assert_close(model(input_ids=ids).logits[..., :size], plain(input_ids=ids).logits)
    losses = train_a_little(model, processor)
    assert losses[-1] < losses[0]


def test_new_tokens_begin_at_the_mean_and_latents_at_the_size_of_embeddings(pairs):
    made = make_model(pairs("qwen2", hidden_size=24), pairs("llama"), num_latents=8)
    model, tokenizer = made.model, made.processor.tokenizer
    old = AutoModelForCausalLM.from_pretrained(pairs("llama")).get_input_embeddings().weight
    table = model.get_input_embeddings().weight
    assert len(table) == len(tokenizer) == len(old) + len(marker_tokens.MARKERS + marker_tokens.INLINE_MARKERS)
    assert torch.equal(table[: len(old)], old)
    difference = (table[len(old) :] - old.mean(0)).abs()
    assert difference.max() < 0.1 * old.std(0).max()
    assert (difference > 0).all()
    queries, words = model.model.latent_queries.weight, model.model.encoder.get_input_embeddings().weight
    torch.testing.assert_close(queries.mean(), words.mean(), atol=0.01, rtol=0.1)
    torch.testing.assert_close(queries.std(0).mean(), words.std(0).mean(), atol=0, rtol=0.3)
    ids = tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
    latents = model.get_context_features(ids)
    assert 0.5 < latents.std() / table.std() < 2
    assert torch.equal(model.model.projector.bias, torch.zeros_like(model.model.projector.bias))


def test_same_seed_same_model(pairs):
    first, second, other = (
        make_model(pairs("qwen2", hidden_size=24), pairs("qwen2"), 4, seed=seed).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.latent_queries.weight"], other["model.latent_queries.weight"])


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_that_are_none(pairs, seed):
    with pytest.raises(ValueError, match=rf"`seed` must be 0 to 2\*\*63 - 1, got {seed}"):
        make_model("no encoder", "no decoder", 4, seed=seed)
    model = make_model(pairs("qwen2", hidden_size=24), pairs("qwen2"), 4).model
    with pytest.raises(ValueError, match=r"`seed` must be 0 to 2\*\*63 - 1"):
        resize_latents(model, 6, seed=seed)
    assert model.config.num_latents == 4


def test_untied_heads_grow_too(pairs):
    made = make_model(pairs("qwen2", hidden_size=24), pairs("llama", tie_word_embeddings=False), 2)
    head, table = made.model.lm_head.weight, made.model.get_input_embeddings().weight
    assert head.shape == table.shape
    assert not torch.equal(head, table)
    assert made.model.config.tie_word_embeddings is False
    assert head[-1].isfinite().all()


def test_two_vocabularies_keep_two_tokenizers(pairs, tmp_path):
    made = make_model(pairs("qwen2", kind="words", hidden_size=24), pairs("llama"), 3)
    assert not made.shared_vocabulary
    save_model(made.model, made.processor, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.inline_context_start_token_id is None
    own = AutoTokenizer.from_pretrained(pairs("qwen2", kind="words", hidden_size=24))
    inputs = processor.apply_chat_template(processor.restore_messages("the cat <img> sat"))
    assert inputs["context_input_ids"][0, 0].tolist() == own("the cat <img> sat")["input_ids"]
    start = model.config.encoder_context_start_token_id
    assert processor.encoder_tokenizer.convert_ids_to_tokens(start) == "<img>"
    assert start == len(own)
    assert model.config.context_start_token_id != start
    losses = train_a_little(model, processor)
    assert losses[-1] < losses[0]
    assert len(model.generate(**inputs, max_new_tokens=3)[0]) <= inputs["input_ids"].shape[1] + 3


def test_rows_that_no_token_used_are_filled_too(pairs):
    """Qwen's tables are longer than its vocabulary; marker tokens land in rows that were never trained."""
    made = make_model(pairs("qwen2", hidden_size=24), pairs("qwen2", vocab_size=300), 2)
    table = made.model.get_input_embeddings().weight
    assert len(table) == 300
    old = AutoModelForCausalLM.from_pretrained(pairs("qwen2", vocab_size=300)).get_input_embeddings().weight
    token_id = made.model.config.context_start_token_id
    assert token_id < 300
    torch.testing.assert_close(table[token_id], old[:257].mean(0), atol=0.05 * old.std().item(), rtol=0)


def test_dtype_reaches_both_halves(pairs, tmp_path):
    made = make_model(pairs("qwen2", hidden_size=24), pairs("llama"), 2, dtype=torch.bfloat16)
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    save_model(made.model, made.processor, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_decoder_with_more_than_a_matrix_as_its_head_is_refused(pairs):
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does more in its head than multiply by a matrix"):
        make_model(pairs("qwen2", hidden_size=24), pairs("gemma2", final_logit_softcapping=0.01), 2)


def test_a_decoder_without_an_end_token_is_refused(pairs, tmp_path):
    folder = shutil.copytree(pairs("llama"), tmp_path / "endless")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(folder)
    with pytest.raises(ValueError, match="has no `eos_token`"):
        make_model(pairs("qwen2", hidden_size=24), folder, 2)


OWN_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}"
    "{% if message.content is string %}{{ message['content'] }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "the <b>"},
    {"role": "user", "content": [{"type": "text", "text": "the cat"}, {"type": "text", "text": " sat"}]},
    {"role": "assistant", "content": "</think>"},
    {"role": "user", "content": "on the mat"},
]


@pytest.fixture(scope="module")
def chatty(pairs, tmp_path_factory) -> Path:
    """A language model with a chat template, whose stop ids are listed twice over."""
    folder = shutil.copytree(pairs("llama"), tmp_path_factory.mktemp("chatty") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OWN_TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    settings["eos_token_id"] = [tokenizer.eos_token_id, 5]
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made_of_chatty(chatty, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "c3"
    assert main(["new", str(folder), "--encoder", str(chatty), "--decoder", str(chatty), "--num-latents", "2"]) == 0
    return folder


def test_the_decoders_own_chat_template_stays_beside_c3s(chatty, made_of_chatty, tmp_path):
    stock = AutoTokenizer.from_pretrained(chatty)
    processor = AutoProcessor.from_pretrained(made_of_chatty, trust_remote_code=True)
    export(made_of_chatty, tmp_path / "decoder", "decoder")
    exported = AutoTokenizer.from_pretrained(tmp_path / "decoder")
    expected = stock.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    for take in (
        lambda **options: processor.apply_chat_template(CHAT, chat_template="decoder", **options),
        lambda **options: exported.apply_chat_template(CHAT, add_generation_prompt=True, **options),
    ):
        assert take(tokenize=False) == expected
        assert take(return_tensors="pt", return_dict=True)["input_ids"].tolist() == [stock(expected)["input_ids"]]
    assert processor.apply_chat_template(CHAT, tokenize=False).startswith("<|im_start|>system")
    # C3's goes along, for servers that are asked about contexts; and back again nothing is doubled.
    assert exported.chat_template["c3"].endswith(processor.chat_template["default"][-400:])
    again = make_model(chatty, tmp_path / "decoder", 2)
    assert again.processor.chat_template == processor.chat_template


@pytest.mark.parametrize("content", ["a <|im_end|> b <img>", [{"type": "text", "text": "a <|im_end|> b <img>"}]])
def test_special_strings_in_messages_stay_text_in_the_decoders_own_template(made_of_chatty, tmp_path, content):
    processor = AutoProcessor.from_pretrained(made_of_chatty, trust_remote_code=True)
    export(made_of_chatty, tmp_path / "decoder", "decoder")
    exported = AutoTokenizer.from_pretrained(tmp_path / "decoder")
    chat = [{"role": "user", "content": content}]
    ids = [
        processor.apply_chat_template(chat, chat_template="decoder")["input_ids"][0].tolist(),
        exported.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"],
    ]
    end = processor.tokenizer.eos_token
    for tokens in map(exported.convert_ids_to_tokens, ids):
        assert [token for token in tokens if token in exported.all_special_tokens or token == "<img>"] == [end]
        assert not any("<|im" in token for token in tokens)
    assert exported.decode(ids[1]) == f"[user]a <|im_end|> b <img>{end}\n[assistant]"


def test_an_exported_tokenizer_that_is_rebuilt_gets_the_own_template_without_escapes(pairs, tmp_path):
    folder = shutil.copytree(pairs("qwen2"), tmp_path / "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OWN_TEMPLATE
    tokenizer.save_pretrained(folder)
    made = make_model(pairs("qwen2"), folder, 2)
    save_model(made.model, made.processor, tmp_path / "made")
    export(tmp_path / "made", tmp_path / "decoder", "decoder")
    assert (tmp_path / "decoder" / "chat_template.jinja").read_text(encoding="utf-8") == OWN_TEMPLATE


def test_what_came_out_of_a_c3_model_brings_no_second_template(existing, pairs, tmp_path):
    export(existing, tmp_path / "decoder", "decoder")
    made = make_model(pairs("llama"), tmp_path / "decoder", 2)
    assert isinstance(made.processor.chat_template, str)
    # The markers that only the decoder had are in the encoder's table too.
    assert made.shared_vocabulary
    assert made.model.config.encoder_config.vocab_size == made.model.config.text_config.vocab_size


def test_no_folder_of_the_maker_is_in_what_is_saved(chatty, made_of_chatty, tmp_path):
    export(made_of_chatty, tmp_path / "decoder", "decoder")
    for path in [*made_of_chatty.glob("*.json"), *(tmp_path / "decoder").glob("*.json")]:
        assert str(chatty.parent) not in path.read_text(encoding="utf-8"), path


def test_every_stop_id_is_there_once(made_of_chatty, chatty):
    model, processor = load_model(made_of_chatty)
    eos = AutoTokenizer.from_pretrained(chatty).eos_token_id
    expected = [processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), eos, 5]
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id == expected


def test_a_stride_makes_latents_that_keep_their_places(chatty, tmp_path, capsys):
    words = ["new", str(tmp_path / "out"), "--encoder", str(chatty), "--decoder", str(chatty), "--num-latents", "4"]
    assert main([*words, "--latent-stride", "3"]) == 0
    model, processor = load_model(tmp_path / "out")
    assert (model.config.latent_stride, model.config.longest_segment) == (3, 12)
    losses = train_a_little(model, processor)
    assert losses[-1] < losses[0]
    capsys.readouterr()
    for wrong in (
        [*words[:1], str(tmp_path / "other"), *words[2:], "--latent-stride", "0"],
        ["new", str(tmp_path / "other"), "--from", str(tmp_path / "out"), "--latent-stride", "2"],
    ):
        assert main(wrong) == 1
        assert not (tmp_path / "other").exists()
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "`--latent-stride` must be a positive int or None, got 0" in first
    assert "`--latent-stride` is of a new model: give it with `--encoder` and `--decoder`." in second


@pytest.fixture(scope="module")
def existing(pairs, tmp_path_factory) -> Path:
    made = make_model(pairs("qwen2", hidden_size=24), pairs("llama"), num_latents=4)
    folder = tmp_path_factory.mktemp("existing") / "c3"
    save_model(made.model, made.processor, folder)
    return folder


@pytest.mark.parametrize(
    ("num_latents", "reinitialise", "kept", "note"),
    [
        (6, False, 4, "4 of 4 queries kept, 0 dropped, 2 drawn anew"),
        (2, False, 2, "2 of 4 queries kept, 2 dropped, 0 drawn anew"),
        (5, True, 0, "0 of 4 queries kept, 4 dropped, 5 drawn anew"),
    ],
)
def test_number_of_latents_can_change(existing, tmp_path, num_latents, reinitialise, kept, note):
    model, processor = load_model(existing)
    before = model.model.latent_queries.weight.clone()
    assert resize_latents(model, num_latents, reinitialise=reinitialise) == note
    processor.num_latents = num_latents
    after = model.model.latent_queries.weight
    assert after.shape == (num_latents, 24)
    assert torch.equal(after[:kept], before[:kept])
    assert not any(torch.equal(row, old) for row in after[kept:] for old in before)
    save_model(model, processor, tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    inputs = processor.apply_chat_template(processor.restore_messages("the cat"))
    assert model(**inputs).context_latents.shape == (1, 1, num_latents, 32)


def test_no_latents_at_all_are_refused(existing):
    model, _ = load_model(existing)
    with pytest.raises(ValueError, match="`num_latents` must be at least 1, got 0"):
        resize_latents(model, 0)


def test_exported_halves_go_back(existing, tmp_path):
    export(existing, tmp_path / "decoder", "decoder")
    export(existing, tmp_path / "encoder", "encoder")
    model, processor = load_model(existing)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for half in (model.model.encoder, model.model.language_model):
            for parameter in half.parameters():
                parameter.zero_()
    replace_halves(model, tmp_path / "encoder", tmp_path / "decoder")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    ids = processor.tokenizer("the dog", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(decoder(input_ids=ids).logits, model(input_ids=ids).logits)


def test_halves_of_another_shape_are_refused(existing, pairs):
    model, _ = load_model(existing)
    with pytest.raises(ValueError, match="`encoder` is not shaped like the encoder it replaces"):
        replace_halves(model, encoder=pairs("qwen2"))


def bend(folder, copy, **entries):
    """A copy of a model folder with other entries in its config.json."""
    shutil.copytree(folder, copy)
    fields = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**fields, **entries}), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_attention_heads": 0}, r"config\.json: transformers cannot build a model of these entries"),
        (
            {"num_hidden_layers": 100_000},
            "`num_hidden_layers` in config.json is 100000, but its weights hold 2",
        ),
        ({"hidden_size": "wide"}, r"config\.json: transformers cannot build a model of these entries"),
    ],
)
def test_a_half_whose_config_cannot_be_is_named(pairs, tmp_path, entries, message):
    whole = pairs("llama")
    bent = bend(whole, tmp_path / "bent", **entries)
    for encoder, decoder in ((bent, whole), (whole, bent)):
        with pytest.raises(ValueError, match=message) as caught:
            make_model(encoder, decoder, 2)
        assert "bent" in str(caught.value)


def test_a_c3_model_whose_config_cannot_be_is_named(pairs, tmp_path):
    made = make_model(pairs("llama"), pairs("llama"), 2)
    save_model(made.model, made.processor, tmp_path / "ours")
    for number, (half, entries, message) in enumerate(
        [
            ("text_config", {"num_attention_heads": 0}, r"config\.json: transformers cannot build"),
            ("encoder_config", {"num_hidden_layers": 100_000}, r"`encoder_config` of config\.json is 100000, but its"),
            (None, {"model_type": "gpt2"}, r"`model_type` is 'gpt2', expected 'c3'"),
            (
                None,
                {"num_latents": 0},
                r"config\.json: .*`num_latents` must be a positive int",
            ),
        ]
    ):
        fields = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
        changed = {half: {**fields[half], **entries}} if half else entries
        bent = bend(tmp_path / "ours", tmp_path / f"bent-{number}", **changed)
        for use in (load_model, lambda folder: export(folder, tmp_path / "out", "decoder")):
            with pytest.raises(ValueError, match=message) as caught:
                use(bent)
            assert str(bent) in str(caught.value)


def test_the_card_of_a_new_model_says_that_it_is_untrained_and_no_licence(pairs, tmp_path):
    half = str(pairs("llama"))
    assert main(["new", str(tmp_path / "made"), "--encoder", half, "--decoder", half, "--num-latents", "2"]) == 0
    assert main(["new", str(tmp_path / "longer"), "--from", str(tmp_path / "made"), "--num-latents", "3"]) == 0
    save_model(*load_model(tmp_path / "made"), tmp_path / "other")
    made, longer, other = (ModelCard.load(tmp_path / name / "README.md") for name in ("made", "longer", "other"))
    assert "# made\n\n**Untrained:** its latent queries and its projector are drawn at random." in made.text
    assert "its latent queries were changed (2 of 2 queries kept, 0 dropped, 1 drawn anew)." in longer.text
    assert "**Untrained:** its projector's bias is zero, as at the start." in other.text
    assert [card.data.license for card in (made, longer, other)] == [None] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out", "--encoder", "", "--decoder", ""], "the name of a half is empty. Give a folder, a Hub id or a GGUF"),
        (
            ["out", "--from", "", "--num-latents", "4"],
            "`--from` is empty. Give the folder or the Hub id",
        ),
        (["", "--encoder", "a", "--decoder", "b"], "`output` is empty. Give the name of a folder to make"),
    ],
)
def test_empty_names(words, message, capsys):
    assert main(["new", *words]) == 1
    assert message in capsys.readouterr().err
