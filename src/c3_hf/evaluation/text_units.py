"""How the metrics look at characters: which are Han, and what counts as a word."""

from __future__ import annotations

import re
import unicodedata

from rapidfuzz.distance import Levenshtein


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


def normalised_edit_distance(prediction: str, reference: str) -> float:
    """Character Levenshtein distance (insert, delete, substitute cost 1) over the longer length, in [0, 1].

    Lengths are code points of the raw strings; two empty strings are at distance 0.
    """
    return Levenshtein.normalized_distance(prediction, reference)
