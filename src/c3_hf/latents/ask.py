"""Ask compressed contexts what their model was trained for, about the segments that the question is about."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .context import CompressedContext, check_at_least_1
from .decoding import GREEDY, Restorer, decoder_positions, skipped_positions
from .restore import iter_restored, read_segments
from .segments import Source


# Scripts that are written without spaces count by the character: Han, kana, Hangul.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; a Chinese, Japanese or Korean character is one."""
    return [word.casefold() for word in _WORD.findall(text)]


def best_segments(question: str, texts: Sequence[str], most: int) -> list[int]:
    """The segments that share most with a question, in the order of the text.

    Each word of the question that a segment holds counts by its rarity, log(1 + S / s) for s of S segments that hold
    it, and likewise each pair of neighbouring words; among equals the earlier segment is taken.

    Args:
        most: How many to choose, at least 1.

    Returns:
        At most `most` positions in `texts`, ascending; those that share nothing are left out, unless all do.
    """
    wanted = _terms(question)
    held = [wanted & _terms(text) for text in texts]
    holders = Counter(term for terms in held for term in terms)
    scores = [sum(math.log1p(len(texts) / holders[term]) for term in sorted(terms)) for terms in held]
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[:most]
    return sorted(index for index in order if scores[index] > 0) or sorted(order)


def _terms(text: str) -> set[str]:
    words = words_of(text)
    return {*words, *(f"{left} {right}" for left, right in pairwise(words))}


# Room that is kept for an answer where segments have to be chosen, in tokens.
_ANSWER_ROOM = 64


@dataclass(frozen=True)
class Answer:
    """What [`ask`] gives.

    Attributes:
        text: The reply, with `start` in front.
        segments: The segments that were put in front of the model, counted from 0 over all contexts.
        reason: Why these, where not all of them were used; else None.
        cut: What the model wrote behind the words that stand in the text, and what was left out; only for finding.
    """

    text: str
    segments: tuple[int, ...]
    reason: str | None = None
    cut: str = ""

    def __str__(self) -> str:
        return self.text


def ask(
    contexts: Sequence[CompressedContext],
    restorer: Restorer,
    question: str = "",
    *,
    start: str = "",
    segments: Sequence[int] | None = None,
    text: Source | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    progress: bool = False,
    streamer: BaseStreamer | None = None,
) -> Answer:
    """Put compressed contexts and a question in front of the model; the encoder does not run.

    The checkpoint says what it was trained for (`processor.prompts`). With "ask" among its prompts it answers free
    questions. With "find" it goes on from `start`, words of the text; the reply is compared with the restored text
    and given as far as it stands there.

    Args:
        contexts: At least one; all of this model.
        restorer: The model that compressed them, and its processor.
        question: A free question.
        start: How the reply begins.
        segments: Which segments to use, counted from 0 over all contexts; by default all, or of more than the decoder
            has positions for those that share most words with the question.
        text: The text of the only context, to choose segments by; else it is restored.
        max_new_tokens: Most tokens of the reply.
        batch_size: Segments restored in one batch.
        streamer: Is given the reply as it comes; one to `start` before it is compared with the text.

    Returns:
        The answer, and the segments it came from.

    Raises:
        ValueError: If the checkpoint was not trained for this, a context is empty or of another model, `segments` are
            not there or do not fit, or the text does not hold `start`.
    """
    contexts = list(contexts)
    all_segments = [segment for context in contexts for segment in context]
    if not all_segments:
        names = ", ".join(context.name for context in contexts)
        raise ValueError(f"`contexts` holds no text ({names or 'none given'}): there is nothing to ask about.")
    if text is not None and len(contexts) > 1:
        raise ValueError(f"`text` goes with a single context, got {len(contexts)}. Choose by `segments`.")
    check_at_least_1("max_new_tokens", max_new_tokens)
    prompt = choose_prompt(restorer.processor.prompts, question, start)
    for context in contexts:
        restorer.fingerprints.check(context)
    chosen = sorted(set(range(len(all_segments)) if segments is None else segments))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(all_segments):
        raise ValueError(f"`segments` must name some of 0 to {len(all_segments) - 1}, got {chosen}.")
    asker = _Asker(contexts, restorer, start, text, {"batch_size": batch_size, "progress": progress})
    if prompt == "find":
        return asker.find(chosen, max_new_tokens, streamer)
    return asker.answer(question, chosen, segments is None, max_new_tokens, streamer)


def choose_prompt(prompts: dict[str, str], question: str, start: str) -> str:
    """Which of a checkpoint's prompts fits what is asked.

    Raises:
        ValueError: If none does.
    """
    if question and "ask" in prompts:
        return "ask"
    if start and "find" in prompts:
        return "find"
    if "ask" in prompts:
        raise ValueError("`question` is missing: this model answers free questions.")
    if "find" in prompts:
        raise ValueError(
            "`start` is missing: this model was not trained to answer questions. It goes on from words of the text; "
            'give the beginning of a sentence as it stands there, such as "The keeper of the light is".'
        )
    raise ValueError(
        f"this model was not trained to answer questions; the prompts its checkpoint declares are {sorted(prompts)}. "
        "Restoring gives the text back. If it can answer, say so in its processor (`prompts`, docs/contexts.md)."
    )


class _Asker:
    """Contexts, the model they are put in front of, and how the reply begins."""

    def __init__(
        self,
        contexts: list[CompressedContext],
        restorer: Restorer,
        start: str,
        text: Source | None,
        options: dict[str, Any],
    ):
        self.contexts, self.model, self.processor = contexts, restorer.model, restorer.processor
        self.segments = [segment for context in contexts for segment in context]
        self.restorer, self.start, self.text, self.options = restorer, start, text, options
        self.positions = decoder_positions(self.model)

    def answer(
        self, question: str, chosen: list[int], may_choose: bool, max_new_tokens: int, streamer: BaseStreamer | None
    ) -> Answer:
        bare = self._prompt_length(0, question)
        block = self._prompt_length(1, question) - bare + skipped_positions(self.model)
        most = (self.positions - bare - min(max_new_tokens, _ANSWER_ROOM)) // block
        if most < 1 or (len(chosen) > most and not may_choose):
            raise ValueError(
                f"`{'segments' if most > 0 else 'question'}`: {len(chosen)} segments and the question take "
                f"{self._prompt_length(len(chosen), question):,} positions, the model has {self.positions:,}: room "
                f"for {max(0, most)} segments. Give fewer, or a shorter question."
            )
        reason = None
        if len(chosen) > most:
            chosen = [chosen[place] for place in best_segments(question, self._texts(chosen), most)]
            reason = "the best match of words"
        inputs = self._inputs(chosen, "ask", question)
        limit = min(max_new_tokens, self._room(inputs, len(chosen)))
        # How to write an answer is the checkpoint's own business, but for chance.
        output = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False, streamer=streamer)
        return Answer(self.start + self._reply(output, inputs), tuple(chosen), reason)

    def find(self, chosen: list[int], max_new_tokens: int, streamer: BaseStreamer | None) -> Answer:
        texts, start = self._texts(chosen), self.start
        place = find_place(start, texts)
        inputs = self._inputs([chosen[place]], "find", "")
        room = self._room(inputs, 1)
        if room < 1:
            raise ValueError(f"`start` leaves no room for a reply: the model has {self.positions:,} positions.")
        limit = min(max_new_tokens, room)
        output = self.model.generate(**inputs, **GREEDY, max_new_tokens=limit, streamer=streamer)
        reply = self._reply(output, inputs)
        right = part_in_text(reply, texts[place], start)
        return Answer(start + right, (chosen[place],), "it holds the words of `start`", reply[len(right) :])

    def _reply(self, output: torch.Tensor, inputs: Any) -> str:
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _texts(self, chosen: list[int]) -> list[str]:
        """The texts of segments: read if the source was given, else restored."""
        if self.text is not None:
            read = read_segments(self.contexts[0], self.text, self.processor)
            return [read[index].text for index in chosen]
        wanted = [self.segments[index] for index in chosen]
        pieces = iter_restored(wanted, self.restorer, **self.options)
        return [data.decode("utf-8", "replace") for data, _ in pieces]

    def _room(self, inputs: Any, num_blocks: int) -> int:
        """Positions left behind a prompt."""
        return self.positions - inputs["input_ids"].shape[1] - num_blocks * skipped_positions(self.model)

    def _inputs(self, chosen: list[int], prompt: str, question: str) -> Any:
        segments = [self.segments[index] for index in chosen]
        parts = [{"type": "context", "latents": segment.project(self.model)} for segment in segments]
        content = [*parts, {"type": "text", "text": self.processor.prompts[prompt] + question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.start:
            messages.append({"role": "assistant", "content": self.start})
        inputs = self.processor.apply_chat_template(messages, continue_final_message=bool(self.start))
        inputs = inputs.to(self.model.device)
        if self.model.config.latent_stride is not None:
            inputs["context_strides"] = torch.cat([segment.context_strides(self.model) for segment in segments], dim=1)
        return inputs

    def _prompt_length(self, num_blocks: int, question: str) -> int:
        """Positions of a prompt with so many segments; with the begun reply."""
        places = [{"type": "context", "num_blocks": num_blocks, "num_latents": self.processor.num_latents}]
        text = self.processor.prompts["ask"] + question
        content = [*places * bool(num_blocks), {"type": "text", "text": text}]
        length = self.processor.apply_chat_template([{"role": "user", "content": content}])["input_ids"].shape[1]
        return length + len(self.processor.reader.read_plain([self.start])[0][0])


def find_place(start: str, texts: Sequence[str]) -> int:
    """Which of the texts holds `start`, and it the fewest times: the model reads all places at once.

    Raises:
        ValueError: If none does.
    """
    held = {place: text.count(start) for place, text in enumerate(texts) if start in text}
    if not held:
        raise ValueError(f"`start`: no segment looked at holds {start!r}. Give words of the text, to the letter.")
    return min(held, key=lambda place: held[place])


def part_in_text(reply: str, text: str, start: str) -> str:
    """As much of a reply as stands in the text behind `start`.

    Raises:
        ValueError: If that is nothing.
    """
    rests = text.split(start)[1:]
    right = max((os.path.commonprefix([reply, rest]) for rest in rests), key=len)  # noqa: RUF071 - text, no paths
    if not right.strip():
        raise ValueError(
            f"`start`: the model does not find how the text goes on behind {start!r}. Give more words of it."
        )
    return right
