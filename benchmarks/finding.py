"""How often a model goes on from the beginning of a sentence as its context does: of facts, and of the text itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from c3_hf.data.records import TrainingExample
from c3_hf.data.samples import cut_to_tokens
from c3_hf.data.tasks import FIND_PROMPT, TASKS, retrieval_questions, word_starts


# Tokens of the passages that facts are hidden in; a fact has 18 to 25 tokens more.
PASSAGE_TOKENS = (60, 300)
# Tokens a latent at which a text goes on from any place, and how many places are tried; several of a text where there
# are fewer texts.
PLACE_RATIOS = (1, 2, 4, 10)
NUM_PLACES = 100
# Contexts of which one holds the place.
NUM_SEGMENTS = 3
# Words (Chinese characters) of the text that are given, and those that are to follow.
GIVEN_WORDS = 3
WANTED_WORDS = 5


def measure_questions(
    model: Any, processor: Any, texts: Sequence[str], num_questions: int, task: str, passage_tokens: int
) -> list[dict[str, Any]]:
    """Questions about generated facts hidden in the texts ("The access code of the depot at ... is"), by their number.

    With the task "answer_segments" a text comes as two to four contexts, of which one holds the fact. An answer is
    right if it is the rest of the sentence, to the letter, and nothing else.
    """
    right: dict[int, list[bool]] = {}
    for number in range(num_questions):
        passage = cut_to_tokens(processor.reader, texts[number % len(texts)], passage_tokens)
        # The task draws its facts first.
        questions = [question for question, _ in retrieval_questions(np.random.default_rng(number))]
        example = TASKS[task](np.random.default_rng(number), passage)
        sentence = example.messages[-1]["content"][0]["text"]
        given = next(question for question in questions if sentence.startswith(question))
        right.setdefault(len(questions), []).append(go_on(model, processor, example, given) == sentence[len(given) :])
    return [
        {
            "task": task,
            "passage_tokens": passage_tokens,
            "facts": facts,
            "questions": len(items),
            "accuracy": round(float(np.mean(items)), 4),
            "interval": proportion_interval(sum(items), len(items)),
        }
        for facts, items in sorted(right.items())
    ]


def measure_going_on(
    model: Any, processor: Any, texts: Sequence[str], ratio: int, num_segments: int = 1
) -> dict[str, Any]:
    """From any place of a text, `GIVEN_WORDS` words of which are given and stand nowhere else in it.

    Args:
        ratio: tokens for each latent; the beginnings of the texts are cut to so many times the latents of a context.
        num_segments: contexts, each the beginning of another text; the place lies in one of them.

    Returns:
        The share of places where the next word is right, and where the next `WANTED_WORDS` all are.
    """
    length = ratio * model.config.num_latents
    first, all_right = [], []
    for number in range(NUM_PLACES):
        rng = np.random.default_rng(number)
        chosen = [texts[(number + other) % len(texts)] for other in range(num_segments)]
        passages = [cut_to_tokens(processor.reader, text, length) for text in chosen]
        words = words_of(passages[int(rng.integers(num_segments))])
        places = [
            at
            for at in range(1, len(words) - GIVEN_WORDS - WANTED_WORDS)
            if "\n".join(passages).count("".join(words[at : at + GIVEN_WORDS])) == 1
        ]
        if not places:
            continue
        at = int(rng.choice(places))
        given, wanted = words[at : at + GIVEN_WORDS], words[at + GIVEN_WORDS :][:WANTED_WORDS]
        contexts = [{"type": "context", "text": passage} for passage in passages]
        user = {"role": "user", "content": [*contexts, {"type": "text", "text": FIND_PROMPT}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": "".join([*given, *wanted])}]}
        example = TrainingExample((user, reply), (False, True))
        said = words_of(go_on(model, processor, example, "".join(given)))[:WANTED_WORDS]
        first.append(said[:1] == wanted[:1])
        all_right.append(said == wanted)
    return {
        "ratio": ratio,
        "segments": num_segments,
        "places": len(first),
        "next_word": round(float(np.mean(first)), 4),
        "next_word_interval": proportion_interval(sum(first), len(first)),
        "next_words": round(float(np.mean(all_right)), 4),
        "next_words_interval": proportion_interval(sum(all_right), len(all_right)),
    }


def words_of(text: str) -> list[str]:
    """The text in words, each with the blank in front of it, and Chinese characters."""
    return [text[start:end] for start, end in itertools.pairwise([*word_starts(text), len(text)])]


def proportion_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which is not empty where none or all are right, as a bootstrap's is."""
    z, share = 1.96, right / total
    middle, reach = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    ends = [(middle + side * reach) / (1 + z**2 / total) for side in (-1, 1)]
    return round(max(0.0, ends[0]), 4), round(min(1.0, ends[1]), 4)


def go_on(model: Any, processor: Any, example: TrainingExample, given: str) -> str:
    """What the model adds to a reply of which `given` is there."""
    begun = {"role": "assistant", "content": [{"type": "text", "text": given}]}
    inputs = processor.apply_chat_template(
        [*example.messages[:-1], begun], add_generation_prompt=False, continue_final_message=True
    ).to(model.device)
    if model.config.latent_stride is not None:
        # The least that covers the context, as where a text is compressed.
        lengths = inputs["context_attention_mask"].sum(dim=-1)
        inputs["context_strides"] = (-(-lengths // model.config.num_latents)).clamp(min=1)
    longest = len(processor.tokenize_context(example.messages[-1]["content"][0]["text"]))
    output = model.generate(**inputs, max_new_tokens=longest + 8, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
