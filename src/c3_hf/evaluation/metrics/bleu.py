"""BLEU through sacrebleu."""

from __future__ import annotations

from c3_hf.evaluation.metric_info import MetricInfo
from c3_hf.evaluation.text_units import has_unspaced_script


INFO = MetricInfo(
    inputs="text",
    low=0.0,
    high=1.0,
    best=1.0,
    source="Papineni et al. 2002 as computed by sacrebleu's sentence_bleu (Post 2018), divided by 100",
)


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
