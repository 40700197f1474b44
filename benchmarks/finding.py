"""How often a model goes on from the beginning of a sentence as its context does: of facts, and of the text itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from c3_hf.data.records import TrainingExample
from c3_hf.data.samples import cut_to_tokens
from c3_hf.data.tasks import TASKS, find, retrieval_questions


# Of the context; facts come on top.
NUM_TOKENS = 300
# Of a sentence that is begun with so many tokens, at least as many are to be found.
GIVEN_TOKENS = 6


def measure_questions(
    model: Any, processor: Any, texts: Sequence[str], num_questions: int, task: str = "answer"
) -> list[dict[str, Any]]:
    """Questions about generated facts hidden in the texts ("The access code of the depot at ... is"), by their number.

    With the task "answer_segments" a text comes as two to four contexts, of which one holds the fact. An answer is
    right if it is the rest of the sentence, to the letter, and nothing else.
    """
    right: dict[int, list[bool]] = {}
    for number in range(num_questions):
        passage = cut_to_tokens(processor.reader, texts[number % len(texts)], NUM_TOKENS)
        # The task draws its facts first.
        questions = [question for question, _ in retrieval_questions(np.random.default_rng(number))]
        example = TASKS[task](np.random.default_rng(number), passage)
        sentence = reply_of(example)
        given = next(question for question in questions if sentence.startswith(question))
        right.setdefault(len(questions), []).append(go_on(model, processor, example, given) == sentence[len(given) :])
    return [
        {
            "facts": facts,
            "questions": len(items),
            "accuracy": round(float(np.mean(items)), 4),
            "interval": proportion_interval(sum(items), len(items)),
        }
        for facts, items in sorted(right.items())
    ]


def measure_sentences(model: Any, processor: Any, texts: Sequence[str]) -> dict[str, Any]:
    """A sentence of each text, of which the first `GIVEN_TOKENS` tokens are given.

    Returns:
        The share that came back to the letter, and of which the words that followed were right at least.
    """
    exact, begun = [], []
    for number, text in enumerate(texts):
        passage = cut_to_tokens(processor.reader, text, NUM_TOKENS)
        example = find(np.random.default_rng(number), passage)
        sentence = reply_of(example)
        given = cut_to_tokens(processor.reader, sentence, GIVEN_TOKENS)
        wanted = sentence[len(given) :]
        if len(processor.tokenize_context(wanted)) < GIVEN_TOKENS:
            continue
        said = go_on(model, processor, example, given)
        exact.append(said == wanted)
        begun.append(said.startswith(cut_to_tokens(processor.reader, wanted, GIVEN_TOKENS)))
    return {
        "sentences": len(exact),
        "exact": round(float(np.mean(exact)), 4),
        "exact_interval": proportion_interval(sum(exact), len(exact)),
        f"next_{GIVEN_TOKENS}_tokens": round(float(np.mean(begun)), 4),
    }


def proportion_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which is not empty where none or all are right, as a bootstrap's is."""
    z, share = 1.96, right / total
    middle, reach = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    ends = [(middle + side * reach) / (1 + z**2 / total) for side in (-1, 1)]
    return round(max(0.0, ends[0]), 4), round(min(1.0, ends[1]), 4)


def reply_of(example: TrainingExample) -> str:
    """The sentence asked for."""
    return example.messages[-1]["content"][0]["text"]


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
    longest = len(processor.tokenize_context(reply_of(example)))
    output = model.generate(**inputs, max_new_tokens=longest + 8, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
