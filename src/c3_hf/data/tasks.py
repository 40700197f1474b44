"""Tasks made from plain text: restore it, continue it, find a sentence in it, answer a question about it.

A task is a function of a random generator and a text; `TASKS` names those a recipe can mix.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ..modeling.prompt_c3 import RESTORE_PROMPT
from .schema import TrainingExample


CONTINUE_PROMPT = "Continue the text: "
# The reply is a sentence of the context; who asks gives its beginning, as that of the assistant's message.
FIND_PROMPT = "Find the sentence: "
# Room the "answer" task leaves for its facts, in tokens of a small vocabulary, and the most facts of a context.
FACT_TOKENS = 75
MAX_FACTS = 3

_SENTENCE_END = re.compile(r"[.!?]+[”’\"')]*\s+|[。！？]+[”’」』]*\s*|\n+")
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
    return {"find": FIND_PROMPT} if tasks.get("find") or tasks.get("answer") else {}


def restore(rng: np.random.Generator, text: str) -> TrainingExample:
    """The whole text back, with the original's prompt "Repeat the text: "."""
    return _example(text, RESTORE_PROMPT, text, "restore")


def continue_text(rng: np.random.Generator, text: str) -> TrainingExample:
    """The first part (40 to 80 % of the characters, up to a word boundary) is the context, the rest the target."""
    cut = int(len(text) * rng.uniform(0.4, 0.8))
    space = text.find(" ", cut, cut + 24)
    cut = space if space >= 0 else cut
    return _example(text[:cut], CONTINUE_PROMPT, text[cut:], "continue")


def find(rng: np.random.Generator, text: str) -> TrainingExample:
    """A sentence of the text; the whole text if it has none that is whole and longer than a few words."""
    sentences = [sentence.strip() for sentence in _sentences(text)[:-1]]
    long = [sentence for sentence in sentences if len(sentence) >= _MIN_SENTENCE_CHARS] or [text]
    return _example(text, FIND_PROMPT, long[int(rng.integers(len(long)))], "find")


def answer(rng: np.random.Generator, text: str) -> TrainingExample:
    """Generated facts, one to `MAX_FACTS`, are hidden between the sentences of the text, and one is asked for."""
    facts = [f"{question} {value}." for question, value in retrieval_questions(rng)]
    sentences = _sentences(text)
    places = sorted(rng.integers(len(sentences), size=len(facts)), reverse=True)
    for place, fact in zip(places, facts):
        sentences.insert(place, f"{fact} ")
    return _example("".join(sentences), FIND_PROMPT, facts[int(rng.integers(len(facts)))], "answer")


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


def _example(context: str, prompt: str, reply: str, task: str) -> TrainingExample:
    user = {"role": "user", "content": [{"type": "context", "text": context}, {"type": "text", "text": prompt}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    return TrainingExample((user, assistant), (False, True), task)


TASKS: Mapping[str, Callable[[np.random.Generator, str], TrainingExample]] = MappingProxyType(
    {"restore": restore, "continue": continue_text, "find": find, "answer": answer}
)
