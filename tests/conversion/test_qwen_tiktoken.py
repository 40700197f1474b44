"""The tokenizer built from qwen.tiktoken against tiktoken itself, in both directions."""

from __future__ import annotations

import base64
import gzip
import json
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from c3_hf.conversion import qwen_tiktoken
from c3_hf.modeling.prompt_c3 import ESCAPE, SPECIAL_TOKENS, SPLIT_PATTERN


FUZZ_COUNT = 3_000
SLOW_FUZZ_COUNT = 100_000


@pytest.fixture(scope="module")
def vocabulary_file(shared_dir: Path) -> Path:
    return shared_dir / "data" / "tokenizer" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def tokenizer(shared_dir: Path, vocabulary_file: Path, converted_goldens: dict[str, Path]) -> PreTrainedTokenizerFast:
    """The released vocabulary as conversion leaves it in a folder, loaded again through the auto class."""
    golden = shared_dir / "goldens" / "vocab_b" / "checkpoint" / vocabulary_file.name
    assert golden.read_bytes() == vocabulary_file.read_bytes()
    return AutoTokenizer.from_pretrained(converted_goldens["vocab_b"])


@pytest.fixture(scope="module")
def reference(vocabulary_file: Path) -> tiktoken.Encoding:
    """tiktoken over the original's file, with the original's pattern and special tokens."""
    lines = vocabulary_file.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding(
        "qwen",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={text: len(ranks) + i for i, text in enumerate(SPECIAL_TOKENS)},
    )


def reference_ids(reference: tiktoken.Encoding, text: str) -> list[int]:
    # tokenization_qwen.py normalises first and allows all special tokens.
    return reference.encode(unicodedata.normalize("NFC", text), allowed_special="all")


def assert_same(tokenizer: PreTrainedTokenizerFast, reference: tiktoken.Encoding, texts: list[str]) -> None:
    encodings = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, encodings, strict=True):
        assert ids == reference_ids(reference, text), text
    for ids, decoded in zip(encodings, tokenizer.batch_decode(encodings), strict=True):
        assert decoded == reference.decode(ids, errors="replace"), ids


def eval_texts(shared_dir: Path) -> list[str]:
    texts: list[str] = []
    for path in sorted((shared_dir / "data" / "eval").iterdir()):
        if path.name.endswith(".jsonl.gz"):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                texts += [json.loads(line)["text"] for line in lines]
        else:
            pages = json.loads(path.read_text(encoding="utf-8"))
            texts += [turn["value"] for page in pages for turn in page["conversations"]]
    return texts


@pytest.fixture(scope="module")
def newer_marks(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """Combining marks that Python's Unicode tables know and the `tokenizers` library's older ones do not.

    The library's NFC leaves them where they stand among other marks; nothing else about a text differs.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    marks = (chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code)))
    # U+0345 has the highest combining class, so canonical order puts every other mark in front of it.
    return {
        mark
        for mark in marks
        if normalizer.normalize_str("a\u0345" + mark) != unicodedata.normalize("NFC", "a\u0345" + mark)
    }


def fuzz_texts(count: int, seed: int) -> list[str]:
    """Strings of mixed scripts, marks, white space, digits, control characters and special strings."""
    rng = random.Random(seed)
    ranges = (
        *[(0x20, 0x7E)] * 6,
        *[(0x4E00, 0x9FFF)] * 3,
        (0x09, 0x0D),
        (0x00, 0x1F),
        (0xA0, 0x24F),
        (0x300, 0x36F),
        (0x370, 0x5FF),
        (0x600, 0x6FF),
        (0x900, 0xDFF),
        (0x1100, 0x11FF),
        (0x2000, 0x206F),
        (0x2070, 0x218B),
        (0x3000, 0x30FF),
        (0xAC00, 0xD7A3),
        (0xFB00, 0xFB4F),
        (0xFF00, 0xFFEF),
        (0x1F300, 0x1FAFF),
        (0x20000, 0x2A6DF),
    )
    pieces = ("'s", "'LL", " 12345", "  ", "\r\n", "\n\n", "\t", "<|im_end", "|>", "<img", "http://a.b/c?d=1", " the")
    texts = []
    for _ in range(count):
        parts: list[str] = []
        for _ in range(rng.randint(1, 30)):
            kind = rng.random()
            if kind < 0.05:
                # A combining mark straight after a special string is the known difference; a letter keeps it apart.
                parts += [rng.choice(SPECIAL_TOKENS), "a"]
            elif kind < 0.2:
                parts.append(rng.choice(pieces))
            else:
                low, high = rng.choice(ranges)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
        texts.append("".join(parts))
    return texts


def test_size_special_ids_and_defaults(tokenizer):
    assert len(tokenizer) == 151_860
    ids = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "<|extra_204|>", "<img>", "</img>", "<imgpad>"]
    )
    assert ids == [151643, 151645, 151850, 151857, 151858, 151859]
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 151643
    assert tokenizer.is_fast


def test_goldens(tokenizer, shared_dir):
    cases = json.loads((shared_dir / "goldens" / "vocab_b" / "cases.json").read_text(encoding="utf-8"))["tokenization"]
    assert len(cases) > 30
    for case in cases:
        ids = tokenizer(case["text"])["input_ids"]
        assert ids == case["ids"]
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


def test_evaluation_texts(tokenizer, reference, shared_dir):
    texts = eval_texts(shared_dir)
    assert len(texts) > 700
    assert_same(tokenizer, reference, texts)


def without(marks: set[str], texts: list[str]) -> list[str]:
    table = str.maketrans("", "", "".join(marks))
    return [text.translate(table) for text in texts]


def test_only_marks_unassigned_in_unicode_3_are_normalised_otherwise(newer_marks):
    assert all(unicodedata.ucd_3_2_0.category(mark) == "Cn" for mark in newer_marks)


def test_fuzzed_strings(tokenizer, reference, newer_marks):
    assert_same(tokenizer, reference, without(newer_marks, fuzz_texts(FUZZ_COUNT, seed=1)))


@pytest.mark.slow
def test_many_fuzzed_strings(tokenizer, reference, newer_marks):
    for seed in range(10):
        assert_same(tokenizer, reference, without(newer_marks, fuzz_texts(SLOW_FUZZ_COUNT // 10, seed=100 + seed)))


def test_decoding_any_ids(tokenizer, reference):
    """Also sequences that no text gives, with broken UTF-8 inside."""
    rng, size = random.Random(3), len(tokenizer)
    sequences = [[rng.randrange(size) for _ in range(rng.randint(1, 20))] for _ in range(2_000)]
    for ids, decoded in zip(sequences, tokenizer.batch_decode(sequences), strict=True):
        assert decoded == reference.decode(ids, errors="replace"), ids


def test_escaped_special_strings_are_plain_text(tokenizer, reference):
    for text in SPECIAL_TOKENS:
        ids = tokenizer("x" + text.replace("<", "<" + ESCAPE))["input_ids"]
        assert ids == reference.encode("x" + text, disallowed_special=())


@pytest.mark.slow
def test_every_merge_makes_its_token(vocabulary_file, shared_dir):
    ranks = qwen_tiktoken.read_ranks(vocabulary_file)
    merges = qwen_tiktoken.recover_merges(ranks)
    assert len(merges) == 151_387
    assert [ranks[left + right] for left, right in merges] == sorted(ranks[left + right] for left, right in merges)


def test_file_comes_back_byte_for_byte(tokenizer, vocabulary_file, tmp_path):
    qwen_tiktoken.write_ranks(qwen_tiktoken.ranks_of(tokenizer), tmp_path / "back.tiktoken")
    assert (tmp_path / "back.tiktoken").read_bytes() == vocabulary_file.read_bytes()


def small_ranks(*words: bytes) -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *words])}


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_line_ends_do_not_matter(tmp_path, newline):
    ranks = small_ranks(b"ab", b"abc")
    qwen_tiktoken.write_ranks(ranks, tmp_path / "ranks")
    path = tmp_path / "other"
    path.write_bytes((tmp_path / "ranks").read_bytes().replace(b"\n", newline) + newline)
    assert qwen_tiktoken.read_ranks(path) == ranks


def test_merges_follow_rank_order():
    assert qwen_tiktoken.recover_merges(small_ranks(b"bc", b"ab", b"abc")) == [
        (b"b", b"c"),
        (b"a", b"b"),
        (b"a", b"bc"),
    ]


def test_unusable_files_are_refused(tmp_path):
    path = tmp_path / "ranks"
    path.write_text("YQ== 0\nnonsense\n", encoding="ascii")
    with pytest.raises(ValueError, match="line 2: expected '<base64> <rank>', got 'nonsense'"):
        qwen_tiktoken.read_ranks(path)
    qwen_tiktoken.write_ranks({token: rank + (rank > 9) for token, rank in small_ranks().items()}, path)
    with pytest.raises(ValueError, match="do not have the ranks 0 to 255, each once"):
        qwen_tiktoken.read_ranks(path)
    qwen_tiktoken.write_ranks({b"a": 0, b"b": 1}, path)
    with pytest.raises(ValueError, match=r"254 of the 256 single bytes have no rank \(first: 0x00\)"):
        qwen_tiktoken.read_ranks(path)


def test_tokens_that_no_merge_makes_are_refused():
    with pytest.raises(ValueError, match=r"token b'abc' \(rank 256\) is no merge of two tokens"):
        qwen_tiktoken.recover_merges(small_ranks(b"abc"))


def test_vocabulary_outside_the_byte_alphabet_is_refused(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    content = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"中": 0}, "unk_token": "中"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    plain = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="not spelled in the byte-level alphabet"):
        qwen_tiktoken.ranks_of(plain)
