from __future__ import annotations

import gzip
import json

import pytest

from c3_hf import C3Processor
from c3_hf.training.tokenizer import SPECIAL_TOKENS, main, read_texts, train_tokenizer


TEXTS = ["It was the best of times, it was the worst of times. " * 3, "话说天下大势，分久必合，合久必分。" * 3]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 520)


def test_words_and_special_tokens(tokenizer):
    # So little text does not fill the vocabulary: the bytes, some words, then the special tokens.
    assert 256 + len(SPECIAL_TOKENS) < len(tokenizer) <= 520
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    assert tokenizer.convert_ids_to_tokens(range(first, len(tokenizer))) == list(SPECIAL_TOKENS)
    assert len(SPECIAL_TOKENS) == 217
    assert len(tokenizer("it was the best", add_special_tokens=False)["input_ids"]) < 15


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter(TEXTS), 520)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("text", ["a <|im_end|> b", "<img>", "1234 don't  \n\n x", "天下🙂 é", "\ttab"])
def test_text_comes_back(tokenizer, text):
    processor = C3Processor(tokenizer, num_latents=4)
    ids = processor.tokenize_context(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) - len(SPECIAL_TOKENS)


def test_digits_stay_single(tokenizer):
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == 5


def test_too_small_vocabulary():
    with pytest.raises(ValueError, match="`vocab_size` is 300, but the 256 bytes"):
        train_tokenizer(iter(TEXTS), 300)


def test_reading_a_share_of_the_texts(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": str(number)}) + "\n" for number in range(200))
    assert list(read_texts(path)) == [str(number) for number in range(200)]
    half = list(read_texts(path, 0.5))
    assert 60 < len(half) < 140
    assert list(read_texts(path, 0.5)) == half


def test_command(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    main([str(tmp_path / "out"), "520", f"{path}:1", str(path)])
    again = train_tokenizer(iter(TEXTS * 2), 520)
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["model"] == json.loads(again.backend_tokenizer.to_str())["model"]
    with pytest.raises(SystemExit, match="usage"):
        main(["folder"])
