"""Asking, as the page shows it: the reply as it comes, then the answer and where it was read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from transformers import TextIteratorStreamer

from ..latents.ask import choose_prompt
from ..pipeline import C3Pipeline
from . import markup
from .study import BATCH, Study, restore_within


# Tokens of a reply at most: an answer, not a chapter.
MAX_NEW_TOKENS = 200


def answers(pipe: C3Pipeline, study: Study, question: str, start: str) -> Iterator[tuple[str, str]]:
    """The reply so far, and at its end with the text in which the segments that were read are marked; as HTML.

    Raises:
        ValueError: If the checkpoint was not trained for this, or it cannot be answered, see [`C3Pipeline.ask`].
    """
    found = choose_prompt(pipe.processor.prompts, question, start) == "find"
    if study.text is None and not study.restored:
        for step in restore_within(pipe, study, float("inf")):
            study = step
            yield markup.notice(f"Restoring, to see what stands there: {len(study.restored)} segments…"), ""
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = None if study.text is None else [study.text]
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(
            pipe.ask,
            study.context,
            question,
            start=start,
            text=text,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=BATCH,
            streamer=streamer,
        )
        # Where the call fails nobody else ends the stream.
        asked.add_done_callback(lambda _: streamer.end())
        reply = start
        for piece in streamer:
            reply += piece
            yield _answer(reply, "", "…"), ""
        answer = asked.result()
    said = ", ".join(map(str, answer.segments))
    reason = f", because {'it holds your words' if found else 'of ' + answer.reason}" if answer.reason else ""
    words = f"Read: segment {said} of segments 0 to {len(study.context) - 1}{reason}."
    if answer.cut.strip():
        words += " Struck out: where the reply leaves the text."
    read = markup.segments_read(study.segments, answer.segments, answer.text.strip())
    yield _answer(answer.text, answer.cut, "") + markup.notice(words), read


def _answer(text: str, cut: str, more: str) -> str:
    struck = f"<del>{markup.escape(cut)}</del>" if cut else ""
    return f'<blockquote class="c3-answer" aria-live="polite">{markup.escape(text)}{struck}{more}</blockquote>'
