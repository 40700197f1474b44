"""Metrics over words, and what counts as a word in scripts written without spaces."""

from __future__ import annotations

import re
import unicodedata

from rapidfuzz.distance import LCSseq

from c3_hf.evaluation.metrics import Metric


# CJK ideographs with extensions and compatibility forms, and kana: scripts written without spaces.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def has_unspaced_script(text: str) -> bool:
    """Whether `text` holds a Han or kana character, so that splitting at spaces does not give words."""
    return _UNSPACED_CHARACTER.search(text) is not None


def words(text: str) -> list[str]:
    """Lower-cased words of NFC-normalised `text`; every Han or kana character is a word; punctuation is dropped.

    Equals the default tokenisation of the `rouge-score` package on ASCII text, which drops every other script.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def bleu(prediction: str, reference: str) -> float:
    """Sentence BLEU of the whole text against one reference.

    sacrebleu's defaults (exponential smoothing, case kept) with `effective_order`, so that texts of fewer than four
    words can reach 1, and its `zh` tokenisation where either string holds a Han or kana character, `13a` elsewhere.

    Returns:
        A value in [0, 1], sacrebleu's score / 100; 1 for identical strings, also for two empty ones.
    """
    from sacrebleu.metrics import BLEU

    if prediction == reference:
        return 1.0
    tokenize = "zh" if has_unspaced_script(prediction + reference) else "13a"
    score = BLEU(effective_order=True, tokenize=tokenize).sentence_score(prediction, [reference]).score
    return min(score / 100.0, 1.0)


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words.

    The default tokenizer of `rouge-score` drops everything but a-z and 0-9, so every Chinese text scores 0 there;
    here each Han or kana character is a word. Case, punctuation and the NFC/NFD spelling do not count. The
    subsequence is found by rapidfuzz, milliseconds for a page that takes the pure Python table a second.

    Returns:
        A value in [0, 1]. Where neither text has a word (empty, punctuation, emoji): 1 if the strings are equal,
        else 0.
    """
    predicted, expected = words(prediction), words(reference)
    if not predicted and not expected:
        return float(prediction == reference)
    return 2.0 * LCSseq.similarity(predicted, expected) / (len(predicted) + len(expected))


METRICS = {
    "bleu": Metric(
        bleu,
        inputs="text",
        source="Papineni et al. 2002 as computed by sacrebleu's sentence_bleu (Post 2018), divided by 100",
    ),
    "rouge_l": Metric(
        rouge_l,
        inputs="text",
        source="Lin 2004, sentence-level ROUGE-L F1; equal to the rouge-score package on ASCII text",
    ),
}
