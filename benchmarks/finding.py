"""How often a model finds a place of its context by the words that stand there: the words that follow, and facts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np

from c3_hf.data.samples import cut_to_tokens
from c3_hf.data.tasks import FIND_PROMPT, TASKS, retrieval_questions, word_starts
from c3_hf.modeling.prompt_c3 import TokenReader


# Words of the place that is asked for, and words behind them that are looked at.
GIVEN_WORDS = 3
NEXT_WORDS = 4
# Tokens of prose that facts are hidden in: so few that one or two facts and they are hardly more than two tokens a
# latent, enough for two to four contexts of that ratio, and a page.
PROSE_TOKENS = (20, 80, 300)


def measure_places(pipe: Any, texts: Sequence[str], ratio: int, num_places: int) -> dict[str, Any]:
    """Places of the texts' pieces of `ratio` tokens a latent, each by `GIVEN_WORDS` words of it.

    Returns:
        The share of which the next word was right, to the letter, and of which the next `NEXT_WORDS` words were.
    """
    next_words, all_words = [], []
    places = _places(pipe.processor.reader, texts, ratio * pipe.model.config.num_latents)
    for given, wanted, context in islice(places, num_places):
        # One word more, so that the end of the last one is seen.
        said = go_on(pipe, [context], given, len(pipe.processor.tokenize_context("".join(wanted))) + NEXT_WORDS)
        next_words.append(_words(said)[:1] == wanted[:1])
        all_words.append(_words(said)[:NEXT_WORDS] == wanted)
    return {
        "ratio": ratio,
        "places": len(next_words),
        "next_word": _share(next_words),
        "next_word_interval": proportion_interval(sum(next_words), len(next_words)),
        f"next_{NEXT_WORDS}_words": _share(all_words),
    }


def _places(reader: TokenReader, texts: Sequence[str], num_tokens: int) -> Iterator[tuple[str, list[str], str]]:
    """From each text in turn, again and again: words given, words wanted, the piece of the text they stand in.

    Raises:
        ValueError: if a hundred pieces one after the other have too few words.
    """
    too_short = 0
    for number, text in enumerate(cycle(texts)):
        rng = np.random.default_rng(number)
        starts = word_starts(text)
        piece = cut_to_tokens(reader, text[int(rng.choice(starts[: len(starts) // 2])) :].lstrip(), num_tokens)
        # The last word may be cut.
        words = _words(piece)[:-1]
        last = len(words) - GIVEN_WORDS - NEXT_WORDS
        too_short = too_short + 1 if last < 0 else 0
        if too_short == 100:
            raise ValueError(
                f"`texts`: pieces of {num_tokens} tokens hardly ever have {GIVEN_WORDS + NEXT_WORDS} words."
            )
        if last < 0:
            continue
        at = int(rng.integers(last + 1))
        middle = at + GIVEN_WORDS
        yield "".join(words[at:middle]).lstrip(), words[middle : middle + NEXT_WORDS], piece


def _words(text: str) -> list[str]:
    starts = word_starts(text)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


def measure_questions(
    pipe: Any, texts: Sequence[str], num_questions: int, num_tokens: int, task: str = "answer"
) -> list[dict[str, Any]]:
    """Questions about generated facts ("The access code of the depot at ... is") in texts of so many tokens, by the
    number of the facts.

    With the task "answer_segments" a text comes as two to four contexts, of which one holds the fact. An answer is
    right if it is the rest of the sentence, to the letter, and nothing else.
    """
    right: dict[int, list[bool]] = {}
    for number in range(num_questions):
        passage = cut_to_tokens(pipe.processor.reader, texts[number % len(texts)], num_tokens)
        # The task draws its facts first.
        questions = [question for question, _ in retrieval_questions(np.random.default_rng(number))]
        asked, reply = TASKS[task](np.random.default_rng(number), passage).messages
        sentence = reply["content"][0]["text"]
        given = next(question for question in questions if sentence.startswith(question))
        contexts = [part["text"] for part in asked["content"] if part["type"] == "context"]
        said = go_on(pipe, contexts, given, len(pipe.processor.tokenize_context(sentence)) + 8)
        right.setdefault(len(questions), []).append(said == sentence[len(given) :])
    return [
        {
            "prose_tokens": num_tokens,
            "facts": facts,
            "questions": len(items),
            "accuracy": _share(items),
            "interval": proportion_interval(sum(items), len(items)),
        }
        for facts, items in sorted(right.items())
    ]


def _share(items: Sequence[bool]) -> float:
    return round(float(np.mean(items)), 4)


def proportion_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which is not empty where none or all are right, as a bootstrap's is."""
    z, share = 1.96, right / total
    middle, reach = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    ends = [(middle + side * reach) / (1 + z**2 / total) for side in (-1, 1)]
    return round(max(0.0, ends[0]), 4), round(min(1.0, ends[1]), 4)


def go_on(pipe: Any, contexts: Sequence[str], given: str, max_new_tokens: int) -> str:
    """What the model adds, greedily, to a reply of which `given` is there."""
    parts = [{"type": "context", "text": text} for text in contexts]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": FIND_PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": given}]},
    ]
    return pipe(messages, max_new_tokens=max_new_tokens, do_sample=False)
