"""C3Config: defaults, validation, files that both ends of the transformers range read alike."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from c3_hf import C3Config
from factories import make_config, sub_config


def test_defaults_are_the_released_shapes():
    config = C3Config()
    assert (config.num_latents, config.projector_bias) == (32, True)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (2048, 36)
    assert (config.encoder_config.hidden_size, config.encoder_config.num_hidden_layers) == (1536, 28)
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is True
    assert config.get_text_config() is config.text_config


def test_any_family_and_both_forms():
    config = make_config(text_config=LlamaConfig(vocab_size=300), encoder_config=sub_config("qwen3"))
    assert config.text_config.model_type == "llama"
    assert config.encoder_config.model_type == "qwen3"


def test_tying_reaches_the_text_config():
    config = make_config(tie_word_embeddings=False)
    assert config.text_config.tie_word_embeddings is config.tie_word_embeddings is False
    # Set later, too: 4.57 would save such a model without its head.
    config.tie_word_embeddings = True
    assert config.text_config.tie_word_embeddings is config.tie_word_embeddings is True
    assert make_config(text_config=sub_config(tie_word_embeddings=False)).tie_word_embeddings is False


def test_it_says_nothing_that_it_does_not_know(tmp_path):
    """No licence of weights that it has not seen, and no class but its own."""
    config = C3Config(text_config=LlamaConfig(vocab_size=151860), encoder_config=LlamaConfig(vocab_size=151860))
    assert (config.license, config.base_models, getattr(config, "auto_map", None)) == (None, None, None)
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.get("license") is None
    assert fields["auto_map"] == {"AutoConfig": "configuration_c3.C3Config"}


def test_round_trip(tmp_path):
    assert make_config().segment_length is None
    config = make_config(num_latents=7, segment_length=99, base_models=["a/b"], license="mit")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, C3Config)
    for name in (
        "num_latents",
        "segment_length",
        "context_token_id",
        "encoder_context_start_token_id",
        "base_models",
        "license",
    ):
        assert getattr(loaded, name) == getattr(config, name)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_c3.C3Config"
    assert (tmp_path / "configuration_c3.py").is_file()


@pytest.mark.parametrize(
    "saved",
    [
        {"rope_theta": 54321.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}},
    ],
    ids=["as 4.57 saves", "as 5.x saves"],
)
def test_rope_theta_survives_either_format(saved):
    """The frequencies themselves are compared: a silent fall-back to 10,000 is the fault this guards against."""
    from transformers import AutoModel

    config = make_config(text_config={**sub_config(), **saved})
    rotary = AutoModel.from_config(config.text_config).rotary_emb
    expected = 54321.0 ** (-2 * 1 / (32 // 4))
    assert rotary.inv_freq[1].item() == pytest.approx(expected, rel=1e-5)


def test_scaled_rope_survives_the_newer_format():
    from transformers import AutoModel

    rope = {"rope_type": "linear", "rope_theta": 54321.0, "factor": 4.0}
    rotary = AutoModel.from_config(make_config(text_config={**sub_config(), "rope_parameters": rope}).text_config)
    assert rotary.rotary_emb.inv_freq[0].item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_latents": 0}, ValueError, "`num_latents` must be a positive int, got 0"),
        ({"num_latents": True}, ValueError, "`num_latents` must be a positive int, got True"),
        ({"num_latents": 3.0}, ValueError, r"`num_latents` must be a positive int, got 3\.0"),
        ({"segment_length": 0}, ValueError, "`segment_length` must be a positive int or None, got 0"),
        ({"segment_length": True}, ValueError, "`segment_length` must be a positive int or None, got True"),
        ({"segment_length": "640"}, ValueError, "`segment_length` must be a positive int or None, got '640'"),
        (
            {"context_token_id": 264},
            ValueError,
            r"`context_token_id` must be an int in \[0, 264\).*`text_config`, got 264",
        ),
        ({"context_start_token_id": -1}, ValueError, "`context_start_token_id` must be an int in .* got -1"),
        ({"encoder_context_start_token_id": 999}, ValueError, "vocabulary of `encoder_config`, got 999"),
        ({"context_end_token_id": 263}, ValueError, "special token ids of a C3 model must differ"),
        (
            {"inline_context_end_token_id": None},
            ValueError,
            "belong together, got only `inline_context_start_token_id`",
        ),
        ({"text_config": "qwen2"}, TypeError, "`text_config` must be a PretrainedConfig, a dict or None, got str"),
        (
            {"encoder_config": {"model_type": "nonsense"}},
            ValueError,
            "`encoder_config` could not be built for model_type",
        ),
    ],
)
def test_mistakes(changes, error, message):
    with pytest.raises(error, match=message):
        make_config(**changes)


def test_inline_contexts_can_be_switched_off():
    config = make_config(inline_context_start_token_id=None, inline_context_end_token_id=None)
    assert config.inline_context_start_token_id is None


def test_another_vocabulary_for_the_encoder():
    config = make_config(encoder_config=Qwen2Config(vocab_size=50), encoder_context_start_token_id=49)
    assert (config.context_start_token_id, config.encoder_context_start_token_id) == (261, 49)
