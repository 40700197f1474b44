"""Tasks that are made from plain text: restore it, continue it, find a sentence, answer a question.

A task is a function of a random generator and a text; `TASKS` names those a recipe can mix.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ..modeling.prompt_c3 import RESTORE_PROMPT
from .records import TrainingExample


CONTINUE_PROMPT = "Continue the text: "
# The reply is a sentence of the context; who asks gives its beginning, as that of the assistant's message.
FIND_PROMPT = "Find the sentence: "
# The tasks that hide facts in a text, and all whose reply is found in it by its beginning.
QUESTION_TASKS = ("answer", "answer_segments")
ASKING_TASKS = ("find", "pieces", *QUESTION_TASKS)
# The tasks that are learnt on any kind of text, the others on plain text alone.
ANY_TEXT_TASKS = ("restore", "pieces")
# Room that is left for facts, in tokens of a small vocabulary; the most of a text.
FACT_TOKENS = 75
MAX_FACTS = 3
# Most contexts that a text is cut into where a question goes over several.
MAX_SEGMENTS = 4

_SENTENCE_END = re.compile(r"[.!?]+[”’\"')]*\s+|[。！？]+[”’」』]*\s*|\n+")
# A word with the blank in front of it, as tokenizers take it, or a Chinese character.
_WORD_START = re.compile(r"(?<!\s)\s|[\u3400-\u9fff]")
_PIECE_WORDS = 8
# Shorter sentences are hardly found by their beginning.
_MIN_SENTENCE_CHARS = 20
_CITIES = (
    "Aberdeen Antwerp Bergen Bilbao Bologna Bremen Brno Cadiz Calais Cardiff Cork Dublin Dundee Exeter Faro Galway "
    "Geneva Genoa Ghent Graz Hamburg Kiel Krakow Leeds Leipzig Lille Limerick Linz Lisbon Lyon Malaga Malmo Nantes "
    "Oporto Oslo Ostend Oulu Parma Pisa Plymouth Porto Riga Rostock Seville Siena Split Tartu Trieste Turin Turku "
    "Utrecht Valencia Verona Vienna Vilnius York Zagreb Zurich"
).split()
_FIRST_NAMES = (
    "Ada Agnes Albert Alma Anton Beatrix Clara Conrad Dora Edgar Edith Elsa Emil Felix Flora Gregor Greta Hugo Ida "
    "Irma Jonas Karl Lena Leo Louis Magda Martha Nora Oscar Otto Paula Rosa Rufus Selma Tilda Victor Walter Wilma"
).split()
_LAST_NAMES = (
    "Abbot Baker Barnes Birch Carver Chandler Cole Cooper Crane Dale Fisher Fletcher Forster Frost Garner Glover Hale "
    "Hayward Hobbs Hunter Kemp Lane Marsh Mason Miller Nash Palmer Parker Potter Reed Sadler Shaw Tanner Turner "
    "Walker Webb Weaver Wood"
).split()


def saved_prompts(tasks: Mapping[str, float]) -> dict[str, str]:
    """What a model trained on `tasks` (weights by name) can be asked, as `C3Processor.prompts` holds it."""
    return {"find": FIND_PROMPT} if any(map(tasks.get, ASKING_TASKS)) else {}


def restore(rng: np.random.Generator, text: str) -> TrainingExample:
    """The whole text back, with the original's prompt "Repeat the text: "."""
    return _example([text], RESTORE_PROMPT, text)


def continue_text(rng: np.random.Generator, text: str) -> TrainingExample:
    """The first part (40 to 80 % of the characters, up to a word boundary) is the context, the rest the target."""
    cut = int(len(text) * rng.uniform(0.4, 0.8))
    space = text.find(" ", cut, cut + 24)
    cut = space if space >= 0 else cut
    return _example([text[:cut]], CONTINUE_PROMPT, text[cut:])


def find(rng: np.random.Generator, text: str) -> TrainingExample:
    """A sentence of the text; if it has none that is whole and longer than a few words the text, which stays open."""
    sentences = [sentence.strip() for sentence in _sentences(text)[:-1]]
    long = [sentence for sentence in sentences if len(sentence) >= _MIN_SENTENCE_CHARS]
    if not long:
        return _example([text], FIND_PROMPT, text, is_open=True)
    return _example([text], FIND_PROMPT, long[int(rng.integers(len(long)))])


def pieces(rng: np.random.Generator, text: str) -> TrainingExample:
    """The text in pieces of two to `_PIECE_WORDS` words (Chinese characters), in random order: each token but the
    first of a piece is found by those in front of it alone, and all of the text is asked for once."""
    starts, cuts, at = word_starts(text), [], 0
    while at < len(starts):
        cuts.append(starts[at])
        at += int(rng.integers(2, _PIECE_WORDS + 1))
    found = [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]
    reply = "".join(found[number] for number in rng.permutation(len(found)))
    return _example([text], FIND_PROMPT, reply, is_open=True)


def word_starts(text: str) -> list[int]:
    """Places where the words of a text begin, each with the blank in front of it; its Chinese characters are words."""
    return [0, *(match.start() for match in _WORD_START.finditer(text) if match.start())]


def answer(rng: np.random.Generator, text: str) -> TrainingExample:
    """Generated facts, one to `MAX_FACTS`, are hidden between the sentences of the text, and one is asked for."""
    sentences, reply = _with_facts(rng, text)
    return _example(["".join(sentences)], FIND_PROMPT, reply)


def answer_segments(rng: np.random.Generator, text: str) -> TrainingExample:
    """As `answer`, but the text comes as two to `MAX_SEGMENTS` contexts, cut between its sentences."""
    sentences, reply = _with_facts(rng, text)
    num_segments = min(int(rng.integers(2, MAX_SEGMENTS + 1)), len(sentences))
    ends = [len(sentences) * number // num_segments for number in range(num_segments + 1)]
    contexts = ["".join(sentences[start:end]) for start, end in itertools.pairwise(ends)]
    return _example(contexts, FIND_PROMPT, reply)


def _with_facts(rng: np.random.Generator, text: str) -> tuple[list[str], str]:
    """The sentences of a text with facts between them, and the fact asked for."""
    facts = [f"{question} {value}." for question, value in retrieval_questions(rng)]
    sentences = _sentences(text)
    places = sorted(rng.integers(len(sentences), size=len(facts)), reverse=True)
    for place, fact in zip(places, facts):
        sentences.insert(place, f"{fact} ")
    asked_for = facts[int(rng.integers(len(facts)))]
    return [sentence for sentence in sentences if sentence], asked_for


def _sentences(text: str) -> list[str]:
    """The text in pieces, each with the blanks behind it; the last one is empty or not known to be whole."""
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def retrieval_questions(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return questions about one to `MAX_FACTS` facts, as beginnings of sentences, each with its answer."""
    cities = rng.choice(_CITIES, int(rng.integers(1, MAX_FACTS + 1)), replace=False)
    return [_retrieval_question(rng, str(city)) for city in cities]


def _retrieval_question(rng: np.random.Generator, city: str) -> tuple[str, str]:
    kind = int(rng.integers(3))
    if kind == 0:
        return f"The access code of the depot at {city} is", "".join(str(digit) for digit in rng.integers(0, 10, 6))
    if kind == 1:
        return f"The number of crates on the ferry to {city} is", str(rng.integers(1000, 10000))
    return f"The keeper of the lighthouse at {city} is", f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"


def _example(contexts: Sequence[str], prompt: str, reply: str, is_open: bool = False) -> TrainingExample:
    parts = [{"type": "context", "text": text} for text in contexts]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    return TrainingExample((user, assistant), (False, True), is_open)


TASKS: Mapping[str, Callable[[np.random.Generator, str], TrainingExample]] = MappingProxyType(
    {
        "restore": restore,
        "continue": continue_text,
        "find": find,
        "pieces": pieces,
        "answer": answer,
        "answer_segments": answer_segments,
    }
)
