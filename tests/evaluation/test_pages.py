"""Optical compression: pages are drawn and read by a stock vision-language model of transformers, tiny and random."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import factories
from c3_hf.evaluation.system import SystemSettings, load_meter
from c3_hf.evaluation.systems import deepseek_ocr
from c3_hf.evaluation.systems.deepseek_ocr import MARGIN, PageTooSmall, draw_page, wrap


def ink(page):
    """Rows and columns of the page that are not white."""
    dark = np.asarray(page.convert("L")) < 128
    return np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))


def test_page_has_the_text_within_its_margins():
    page = draw_page("The lamp of the harbour went out.\n\nTwo boats came in. " * 10, side=512)
    rows, columns = ink(page)
    assert page.size == (512, 512)
    assert rows.min() >= MARGIN
    assert columns.min() >= MARGIN - 4
    assert rows.max() <= 512 - MARGIN + 12
    assert columns.max() <= 512 - MARGIN + 4


def test_longer_text_is_drawn_smaller_and_different_text_differently():
    short, long = draw_page("word " * 20, side=512), draw_page("word " * 400, side=512)
    assert ink(long)[0].max() > 250
    first_line = [rows[: np.argmax(np.diff(rows) > 1) + 1] for rows in (ink(short)[0], ink(long)[0])]
    assert len(first_line[0]) > len(first_line[1])
    assert draw_page("a", side=256).tobytes() != draw_page("b", side=256).tobytes()
    assert draw_page("a", side=256).tobytes() == draw_page("a", side=256).tobytes()


def test_text_that_does_not_fit_is_refused():
    with pytest.raises(PageTooSmall, match="`text` of 5000 characters does not fit a page of 256 pixels"):
        draw_page("word " * 1_000, side=256)


def test_chinese_needs_a_font_that_has_it():
    with pytest.raises(ValueError, match="`font` is None, but the text has Han or kana"):
        draw_page("雨下了一整夜。")


@given(st.text(alphabet="ab ", max_size=60), st.integers(1, 12))
def test_wrapping_loses_nothing_and_keeps_to_the_width(line, width):
    pieces = list(wrap(line, width, len))
    assert "".join(pieces) == line
    assert max(map(len, pieces)) <= width


def test_wrapping_breaks_behind_spaces_where_there_are_some():
    assert list(wrap("one two three", 8, len)) == ["one two ", "three"]
    assert list(wrap("abcdefgh", 3, len)) == ["abc", "def", "gh"]


@pytest.fixture(scope="module")
def ocr_checkpoint(tmp_path_factory):
    """GOT-OCR2 from transformers with random weights, saved as on the Hub."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"mlp_dim": 16, "image_size": 1024, "patch_size": 16, "window_size": 2, "global_attn_indexes": [0]}
    tokenizer = factories.make_tokenizer()
    config = transformers.GotOcr2Config(
        vision_config=vision,
        text_config=factories.sub_config(),
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    # The variant that needs no torchvision is the only one of 4.57 and has a name of its own in 5.x.
    five = int(transformers.__version__.split(".")[0]) >= 5
    images = transformers.GotOcr2ImageProcessorPil if five else transformers.GotOcr2ImageProcessor
    folder = tmp_path_factory.mktemp("got")
    transformers.GotOcr2ForConditionalGeneration(config).save_pretrained(folder)
    transformers.GotOcr2Processor(images(size={"height": 1024, "width": 1024}), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_ocr_checkpoint_reads_pages(ocr_checkpoint, tiny_checkpoint):
    meter = load_meter(tiny_checkpoint, 32)
    settings = SystemSettings(
        model=str(tiny_checkpoint), meter=meter, max_new_tokens=4, answer_tokens=3, system_model=str(ocr_checkpoint)
    )
    system = deepseek_ocr.load(settings)
    assert system.slots("The lamp of the harbour went out.") == 256
    texts = ["The lamp of the harbour went out.", "Two boats."]
    restored = system.restore(texts)
    assert len(restored) == 2
    inputs = [system.processor(images=draw_page(text), return_tensors="pt") for text in texts]
    with torch.no_grad():
        generated = system.model.generate(**inputs[0], max_new_tokens=4, do_sample=False)
    new_ids = generated[0, inputs[0]["input_ids"].shape[1] :]
    assert restored[0] == system.processor.decode(new_ids, skip_special_tokens=True)
    assert not torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])
    assert isinstance(system.answer(texts, "What went out?"), str)
    too_long = "word " * 20_000
    assert system.restore([too_long]) == [None]
    assert system.answer([too_long], "What went out?") is None
    assert system.slots(too_long) == 256


@pytest.mark.hub
@pytest.mark.slow
def test_deepseek_ocr_2_reads_a_page(tiny_checkpoint):
    meter = load_meter(tiny_checkpoint, 32)
    settings = SystemSettings(
        model=str(tiny_checkpoint), meter=meter, max_new_tokens=64, system_model="deepseek-ai/DeepSeek-OCR-2"
    )
    text = "The lamp of the harbour went out before the last boat came in."
    assert text[:30] in deepseek_ocr.load(settings).restore([text])[0]
