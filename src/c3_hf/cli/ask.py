"""`c3-hf ask`: questions to compressed contexts."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import STREAM, SUFFIX, check_context, context_path
from .loading import add_model_arguments, check_numbers, load_model
from .messages import check_text


# Room that is kept for an answer where segments have to be chosen, in tokens.
_ANSWER_ROOM = 64


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "ask",
        help="ask about compressed contexts what the model was trained for",
        description="Put compressed contexts and a question in front of the model; the text itself is not needed, "
        "and the encoder does not run. The checkpoint says which prompts it was trained for (docs/contexts.md): one "
        "for free questions takes QUESTION, one for finding takes --start, words of the text from which the reply "
        "goes on. What the model was not trained for is refused. Of contexts that are longer than the model reads, "
        "the segments are used that share most words with the question; stderr says which.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FILE.c3 ... [QUESTION]",
        help="compressed contexts, or - for stdin; the last word is the question, unless it is the name of a file",
    )
    parser.add_argument("--start", metavar="TEXT", help="how the reply begins")
    parser.add_argument(
        "--segments", metavar="LIST", help="the segments to use, such as 0,4-7, counted from 0 over all files"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="the text of the one context, to choose segments by (else restored)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="most tokens of the answer (default: %(default)s)"
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; refuse what the model was not trained for."""
    check_numbers(args, "max_new_tokens", "batch_size")
    files, question = split_words(args.words)
    check_text("QUESTION", question)
    check_text("--start", args.start)
    if args.text is not None and len(files) > 1:
        raise ValueError(f"`--text` goes with a single context, got {len(files)}. Choose by --segments.")
    wanted = None if args.segments is None else parse_segments(args.segments)

    from c3_hf.latents import CompressedContext

    for name in files:
        check_context(name)
    model, processor = load_model(args)
    prompt = choose_prompt(processor.prompts, question, args.start)
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(context_path(name)) for name in files]
        contexts = [CompressedContext.load(path) for path in paths]
        segments = [segment for context in contexts for segment in context]
        if not segments:
            raise ValueError(f"`FILE{SUFFIX}`: {', '.join(files)} holds no text.")
        for context in contexts:
            # One is enough to find out that they were made by another model.
            context[:1].content_parts(model)
        chosen = list(range(len(segments))) if wanted is None else wanted
        if chosen[-1] >= len(segments):
            raise ValueError(f"`--segments` names {chosen[-1]}, there are 0 to {len(segments) - 1}.")
        asker = _Asker(contexts, segments, model, processor, args)
        if prompt == "ask":
            asker.answer(question or "", chosen, may_choose=wanted is None)
        else:
            asker.find(args.start, chosen)
    return 0


def split_words(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The files and the question, which is the last word unless that is the name of a file."""
    last = words[-1]
    if last == STREAM or last.endswith(SUFFIX) or os.path.exists(last):
        return list(words), None
    if len(words) == 1:
        raise ValueError(f"`FILE{SUFFIX}`: there is no file {last}. Give a compressed context in front of a question.")
    return list(words[:-1]), last


def parse_segments(text: str) -> list[int]:
    """Numbers and ranges such as "0,4-7", ascending.

    Raises:
        ValueError: If it is anything else.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"`--segments` must be numbers and ranges such as 0,4-7, got {text!r}.")
        numbers.update(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def choose_prompt(prompts: dict[str, str], question: str | None, start: str | None) -> str:
    """Which of the checkpoint's prompts fits what was asked.

    Raises:
        ValueError: If none does.
    """
    if question is not None and "ask" in prompts:
        return "ask"
    if start and "find" in prompts:
        return "find"
    if "ask" in prompts:
        raise ValueError("`QUESTION` is missing: give it behind the files, in quotation marks.")
    if "find" in prompts:
        raise ValueError(
            "`--start` is missing: this model was not trained to answer questions. It goes on from words of the text; "
            'give the beginning of a sentence as it stands there, --start "The keeper of the light is".'
        )
    raise ValueError(
        f"this model was not trained to answer questions; the prompts its checkpoint declares are {sorted(prompts)}. "
        "`c3-hf restore` gives the text back. If it can answer, say so in its processor (`prompts`, docs/contexts.md)."
    )


class _Asker:
    """Contexts, and the model they are put in front of."""

    def __init__(self, contexts: list[Any], segments: list[Any], model: Any, processor: Any, args: argparse.Namespace):
        self.contexts, self.segments, self.model, self.processor = contexts, segments, model, processor
        self.args = args

    def answer(self, question: str, chosen: list[int], may_choose: bool) -> None:
        """Print the answer to a free question as it comes."""
        from transformers import TextStreamer

        from c3_hf.latents.ask import best_segments

        room = self._positions() - self._prompt_length(0, question)
        block = self._prompt_length(1, question) - self._prompt_length(0, question)
        most = (room - min(self.args.max_new_tokens, _ANSWER_ROOM)) // block
        if most < 1 or (len(chosen) > most and not may_choose):
            raise ValueError(
                f"`{'--segments' if most > 0 else 'QUESTION'}`: {len(chosen)} segments and the question take "
                f"{self._prompt_length(len(chosen), question):,} positions, the model has {self._positions():,}: room "
                f"for {max(0, most)} segments. Give fewer, or a shorter question."
            )
        if len(chosen) > most:
            places = best_segments(question, self._texts(chosen), most)
            chosen = [chosen[place] for place in places]
            self._say(chosen, "the best match of words; --segments chooses others")
        inputs = self._inputs(chosen, "ask", question)
        room = self._positions() - inputs["input_ids"].shape[1]
        sys.stdout.write(self.args.start or "")
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        limit = min(self.args.max_new_tokens, room)
        self.model.generate(**inputs, max_new_tokens=limit, do_sample=False, streamer=streamer)

    def find(self, start: str, chosen: list[int]) -> None:
        """Print the rest of the sentence that begins with `start`, as far as it stands in the text.

        Raises:
            ValueError: If the text does not hold `start`, or the model does not find how it goes on.
        """
        texts = self._texts(chosen)
        held = {place: text.count(start) for place, text in enumerate(texts) if start in text}
        if not held:
            raise ValueError(
                f"`--start`: no segment looked at holds {start!r}. Give words of the text, to the letter."
            )
        # Where the words come several times the model reads all places at once.
        place = min(held, key=lambda place: held[place])
        self._say([chosen[place]], "it holds the words of --start")
        inputs = self._inputs([chosen[place]], "find", "")
        room = self._positions() - inputs["input_ids"].shape[1]
        if room < 1:
            raise ValueError(f"`--start` leaves no room for a reply: the model has {self._positions():,} positions.")
        limit = min(self.args.max_new_tokens, room)
        output = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        reply = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = max((_shared(reply, rest) for rest in texts[place].split(start)[1:]), key=len)
        if not right.strip():
            raise ValueError(
                f"`--start`: the model does not find how the text goes on behind {start!r}. Give more words of it."
            )
        if right != reply:
            print(f"cut where the reply leaves the text: {reply[len(right) :][:40]!r}", file=sys.stderr)
        print(start + right)

    def _texts(self, chosen: list[int]) -> list[str]:
        """The texts of segments: read if the source was given, else restored."""
        from c3_hf.latents import CompressedContext
        from c3_hf.latents.restore import read_segments
        from c3_hf.pipeline import C3Pipeline

        if self.args.text is not None:
            read = read_segments(self.contexts[0], Path(self.args.text), self.processor)
            return [read[index].text for index in chosen]
        texts: list[str] = []
        first = 0
        for context in self.contexts:
            wanted = [self.segments[index] for index in chosen if first <= index < first + len(context)]
            first += len(context)
            if wanted:
                joined = CompressedContext.concatenate(wanted)
                pipe = C3Pipeline(self.model, self.processor)
                pieces = pipe.iter_restored(joined, batch_size=self.args.batch_size, progress=True)
                texts += [data.decode("utf-8", "replace") for data, _ in pieces]
        return texts

    def _inputs(self, chosen: list[int], prompt: str, question: str) -> Any:
        parts = [{"type": "context", "latents": self.segments[index].project(self.model)} for index in chosen]
        text = self.processor.prompts[prompt] + question
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        if not self.args.start:
            return self.processor.apply_chat_template(messages).to(self.model.device)
        messages.append({"role": "assistant", "content": self.args.start})
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=False, continue_final_message=True
        ).to(self.model.device)

    def _prompt_length(self, num_blocks: int, question: str) -> int:
        """Positions of a prompt with so many segments; with the begun reply."""
        places = [{"type": "context", "num_blocks": num_blocks, "num_latents": self.processor.num_latents}]
        text = self.processor.prompts["ask"] + question
        content = [*places * bool(num_blocks), {"type": "text", "text": text}]
        length = self.processor.apply_chat_template([{"role": "user", "content": content}])["input_ids"].shape[1]
        return length + len(self.processor.tokenizer(self.args.start or "", add_special_tokens=False)["input_ids"])

    def _positions(self) -> int:
        from c3_hf.latents.decoding import decoder_positions

        return decoder_positions(self.model)

    def _say(self, chosen: list[int], reason: str) -> None:
        listed = ", ".join(map(str, chosen))
        print(f"used: segment {listed} of 0 to {len(self.segments) - 1} ({reason})", file=sys.stderr)


def _shared(reply: str, text: str) -> str:
    """What `reply` and `text` begin with alike."""
    length = next(
        (index for index, pair in enumerate(zip(reply, text)) if pair[0] != pair[1]), min(len(reply), len(text))
    )
    return reply[:length]
