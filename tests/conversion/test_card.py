"""The card of a model says what is known of it, and no more."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard

from c3_hf.conversion.card import TRANSFORMERS_TEMPLATE_MARK, render_model_card, write_model_card
from c3_hf.conversion.repository import save_model
from factories import make_config, make_model


def test_nothing_that_is_not_known():
    card = ModelCard(render_model_card(make_config(), "someone/a-c3"))
    assert (card.data.license, card.data.base_model) == (None, None)
    assert "Untrained" not in card.text
    assert 'from_pretrained("someone/a-c3", trust_remote_code=True)' in card.text


def test_what_is_known():
    config = make_config(base_models=["some/encoder", "some/decoder"], license="mit")
    card = ModelCard(render_model_card(config, "someone/a-c3"))
    assert (card.data.license, card.data.base_model) == ("mit", ["some/encoder", "some/decoder"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_an_untrained_model_says_so(tmp_path, bias):
    model = make_model()
    torch.nn.init.constant_(model.model.projector.bias, bias)
    save_model(model, None, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert ("# model\n\n**Untrained:** its projector's bias is zero, as at the start." in text) is (bias == 0)
    assert text.count("# model\n") == 1


def test_somebodys_own_card_stays_and_the_template_goes(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n", encoding="utf-8")
    write_model_card(make_config(), tmp_path, "a")
    assert path.read_text(encoding="utf-8") == "# Mine\n"
    path.write_text(TRANSFORMERS_TEMPLATE_MARK, encoding="utf-8")
    write_model_card(make_config(), tmp_path, "a")
    assert path.read_text(encoding="utf-8").startswith("---\nlibrary_name: transformers\n")
