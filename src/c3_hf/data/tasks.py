"""Tasks made from plain text: restore it, continue it, answer a question about it.

A task is a function of a random generator and a text; `TASKS` names those a recipe can mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ..modeling.prompt_c3 import RESTORE_PROMPT
from .schema import TrainingExample


CONTINUE_PROMPT = "Continue the text: "
# Room the "answer" task leaves for its fact, in tokens of a small vocabulary.
FACT_TOKENS = 28

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


def restore(rng: np.random.Generator, text: str) -> TrainingExample:
    """The whole text back, with the original's prompt "Repeat the text: "."""
    return _example(text, RESTORE_PROMPT, text, "restore")


def continue_text(rng: np.random.Generator, text: str) -> TrainingExample:
    """The first part (40 to 80 % of the characters, up to a word boundary) is the context, the rest the target."""
    cut = int(len(text) * rng.uniform(0.4, 0.8))
    space = text.find(" ", cut, cut + 24)
    cut = space if space >= 0 else cut
    return _example(text[:cut], CONTINUE_PROMPT, text[cut:], "continue")


def answer(rng: np.random.Generator, text: str) -> TrainingExample:
    """A generated fact is hidden between two sentences of the text, and asked for."""
    fact, question, reply = retrieval_question(rng)
    boundaries = [0, *(match.end() for match in re.finditer(r"[.!?。！？]\s*|\n+", text))]
    cut = boundaries[int(rng.integers(len(boundaries)))]
    return _example(f"{text[:cut]}{fact} {text[cut:]}", question, reply, "answer")


def retrieval_question(rng: np.random.Generator) -> tuple[str, str, str]:
    """Return a fact, the question about it and the answer, e.g. the access code of a depot."""
    city, kind = str(rng.choice(_CITIES)), int(rng.integers(3))
    if kind == 0:
        value = "".join(str(digit) for digit in rng.integers(0, 10, 6))
        return (
            f"The access code of the {city} depot is {value}.",
            f"What is the access code of the {city} depot?",
            value,
        )
    if kind == 1:
        value = str(rng.integers(1000, 10000))
        fact = f"The ferry to {city} carries exactly {value} crates of tea."
        return fact, f"How many crates of tea does the ferry to {city} carry?", value
    value = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
    return f"The keeper of the {city} lighthouse is named {value}.", f"Who keeps the {city} lighthouse?", value


def _example(context: str, prompt: str, reply: str, task: str) -> TrainingExample:
    user = {"role": "user", "content": [{"type": "context", "text": context}, {"type": "text", "text": prompt}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    return TrainingExample((user, assistant), (False, True), task)


TASKS: Mapping[str, Callable[[np.random.Generator, str], TrainingExample]] = MappingProxyType(
    {"restore": restore, "continue": continue_text, "answer": answer}
)
