"""All metrics that apply to one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from c3_hf.evaluation import catalogue


def score(
    inputs: str,
    prediction: object,
    expected: object,
    options: dict[str, dict] | None = None,
) -> dict[str, float | list]:
    """Results of every metric whose `INFO.inputs` is `inputs`.

    Args:
        inputs: `"text"`, `"tokens"` or `"answer"`.
        prediction: Text, or token ids for `"tokens"`.
        expected: Reference text, its token ids, or the accepted answers.
        options: Keyword arguments by metric name, such as `{"fox": {"meteor": True}}`.

    Returns:
        Values by metric name; a metric that returns a dictionary contributes its keys.
    """
    results: dict[str, float | list] = {}
    for name in catalogue.names("metrics"):
        module = catalogue.find("metrics", name)
        if module.INFO.inputs == inputs:
            value = getattr(module, name)(prediction, expected, **(options or {}).get(name, {}))
            results.update(value if isinstance(value, dict) else {name: value})
    return results


def score_restoration(
    prediction: str, reference: str, encode: Callable[[str], list[int]], meteor: bool = False
) -> dict[str, float | list]:
    """Every metric of a restored text; `encode` turns text into the token ids that the token metrics compare."""
    return {
        **score("text", prediction, reference, {"fox": {"meteor": meteor}}),
        **score("tokens", encode(prediction), encode(reference)),
    }


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float | list]:
    """Every metric of an answer to a question with the accepted `answers`."""
    return score("answer", prediction, answers)
