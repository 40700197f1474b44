"""The page metrics of the Fox benchmark, swapped arguments included.

The tool (ucaslcl/Fox `eval_tools/eval_ocr_test.py`, the same formula as GOT-OCR2.0 `eval_ocr.py`) defines its function
as (path, prediction, ground truth) and calls it as (path, ground truth, prediction). What it prints is reproduced here
to the last digit, so its "precision" is the share of the *ground truth's* distinct words that were produced: what
everyone else calls recall.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings

from rapidfuzz.distance import Levenshtein

from c3_hf.evaluation.metrics import Metric


# The tool's own range; `words` knows more scripts.
_FOX_HAN = re.compile("[\u4e00-\u9fa5]")


def wordnet_available() -> bool:
    """Whether nltk finds the WordNet corpus that METEOR needs; nothing is downloaded."""
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        with contextlib.suppress(LookupError):
            nltk.data.find(name)
            return True
    return False


def fox_tokens(prediction: str, reference: str) -> tuple[list[str], list[str]]:
    """Both texts cut as the tool cuts them: `jieba.lcut` if either holds a Han character, else `str.split`.

    jieba keeps spaces, line breaks and punctuation as tokens; `str.split` leaves punctuation glued to words.
    """
    if not (_FOX_HAN.search(prediction) or _FOX_HAN.search(reference)):
        return prediction.split(), reference.split()
    with warnings.catch_warnings():
        # jieba 0.42 imports pkg_resources, which warns on recent setuptools.
        warnings.simplefilter("ignore")
        import jieba
    # It reports the loading of its dictionary on stderr, in the middle of a progress bar.
    jieba.setLogLevel(logging.WARNING)
    return jieba.lcut(prediction), jieba.lcut(reference)


def fox(prediction: str, reference: str, meteor: bool = False) -> dict[str, float]:
    """The Fox block of one page; the benchmark's figure is the unweighted mean over pages.

    With P the distinct words of the prediction and R those of the reference:

    | key | value |
    |---|---|
    | `fox_precision` | size of P ∩ R over size of **R** (a recall; the tool swaps its arguments) |
    | `fox_recall` | size of P ∩ R over size of **P** (a precision) |
    | `fox_f_measure` | harmonic mean of both; not touched by the swap |
    | `fox_bleu` | nltk sentence BLEU, no smoothing, the **prediction as reference** |
    | `fox_meteor` | nltk METEOR, the **prediction as reference**; only with `meteor=True` |
    | `fox_edit_dist` | character edit distance over the longer length; 0 is best, not touched by the swap |

    Sets forget order and number: shuffled text has `fox_precision` 1.

    Args:
        meteor: Compute METEOR too, which needs nltk's WordNet corpus.

    Returns:
        Values in [0, 1]. Where the tool itself fails (an empty string) the set measures are 1 if neither text has a
        word and 0 if only one has.

    Raises:
        LookupError: If `meteor` is set and the WordNet corpus is not installed.
    """
    from nltk.metrics import f_measure, precision, recall

    predicted, expected = fox_tokens(prediction, reference)
    if predicted and expected:
        # nltk's first argument is its reference. The prediction goes there: this is the tool's swap.
        sets = set(predicted), set(expected)
        overlap = {
            "fox_precision": precision(*sets),
            "fox_recall": recall(*sets),
            "fox_f_measure": f_measure(*sets),
            "fox_bleu": _bleu(predicted, expected),
        }
    else:
        agreement = float(not predicted and not expected)
        overlap = dict.fromkeys(("fox_precision", "fox_recall", "fox_f_measure", "fox_bleu"), agreement)
    if meteor:
        overlap["fox_meteor"] = _meteor(predicted, expected)
    return {**overlap, "fox_edit_dist": Levenshtein.normalized_distance(prediction, reference)}


def _bleu(predicted: list[str], expected: list[str]) -> float:
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        # Without smoothing a missing n-gram order gives about 0, and nltk says so on every page.
        warnings.filterwarnings("ignore", category=UserWarning, module="nltk")
        return float(sentence_bleu([predicted], expected))


def _meteor(predicted: list[str], expected: list[str]) -> float:
    from nltk.translate.meteor_score import meteor_score

    if not wordnet_available():
        raise LookupError(
            "`meteor` is True but nltk finds no WordNet corpus; run nltk.download('wordnet') once, or leave it False."
        )
    return float(meteor_score([predicted], expected))


METRICS = {
    "fox": Metric(
        fox,
        inputs="text",
        source="ucaslcl/Fox eval_tools/eval_ocr_test.py at 82f720c, arguments swapped as in its call",
    ),
}
