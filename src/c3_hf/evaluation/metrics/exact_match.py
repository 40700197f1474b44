"""Exact match."""

from __future__ import annotations

from c3_hf.evaluation.metric_info import MetricInfo


INFO = MetricInfo(inputs="text", low=0.0, high=1.0, best=1.0, source="equality of the raw strings")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both strings have the same code points, else 0.0.

    Nothing is stripped or normalised. A tokenizer that normalises its input to NFC cannot give an NFD text back, so
    on such a text the best possible value is 0.
    """
    return float(prediction == reference)
