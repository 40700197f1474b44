"""The training set: samples made on the fly, each a pure function of the seed and its number.

Nothing has to be remembered to go on after an interruption: the n-th sample of a run is the same in the first start
and in every resumed one, in one process and in many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..modeling.prompt_c3 import TokenReader, as_reader
from .lengths import LengthGroupedBatches, LengthSchedule, SampleKey
from .records import RecordSource, StreamingSource, TrainingExample
from .tasks import ANY_TEXT_TASKS, ASKING_TASKS, FACT_TOKENS, QUESTION_TASKS, TASKS
from .text_kinds import TEXT_KINDS, Draw


# Characters from which a passage is cut, per token wanted: a little more than a token of a small vocabulary holds on
# average in text of mostly one byte a character, and in other text.
_WINDOW_CHARS_PER_TOKEN = (6, 2)


class Sample(NamedTuple):
    """One item for the collator: the example and its address."""

    example: TrainingExample
    key: SampleKey


def cut_to_tokens(tokenizer: PreTrainedTokenizerBase | TokenReader, text: str, num_tokens: int) -> str:
    """Return the longest beginning of `text` that covers at most `num_tokens` tokens and ends between characters."""
    _, offsets = as_reader(tokenizer).read_plain([text])[0]
    if len(offsets) <= num_tokens:
        return text
    # The bytes of one character may lie in several tokens; the character then belongs to the first one left out.
    return text[: min(offsets[num_tokens - 1][1], offsets[num_tokens][0])]


class ExampleMaker:
    """Makes the example of a sample from a record.

    Args:
        tokenizer: counts lengths.
        schedule: lengths of the samples.
        tasks: weights of the tasks made from plain text, by name in `TASKS`.
        text_kinds: weights of the kinds of text, by name in `TEXT_KINDS`, for the tasks in `ANY_TEXT_TASKS`; others
            read plain text always.
        seed: of all choices.

    Raises:
        ValueError: if a name is unknown or the weights of a mixture do not have a positive sum, or none of those
            tasks that the steps of the schedule are divided into.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        schedule: LengthSchedule,
        tasks: Mapping[str, float],
        text_kinds: Mapping[str, float],
        seed: int = 0,
    ) -> None:
        self.reader = as_reader(tokenizer)
        self.schedule = schedule
        self.seed = seed
        self._tasks: dict[bool | None, dict[str, float]] = {None: _check_mixture("tasks", tasks, TASKS)}
        if schedule.asking_stride_ceiling is not None:
            for asks in (True, False):
                some = {task: weight for task, weight in tasks.items() if weight and (task in ASKING_TASKS) is asks}
                if not some:
                    raise ValueError(
                        f"`asking_stride_ceiling` divides the steps into those that ask ({', '.join(ASKING_TASKS)}) "
                        f"and the others, and `tasks` must have some of both, got {dict(tasks)}. Add one, or leave "
                        "the ceiling out."
                    )
                self._tasks[asks] = _check_mixture("tasks", some, TASKS)
        self._text_kinds = _check_mixture("text_kinds", text_kinds, TEXT_KINDS)

    def rng(self, index: int) -> np.random.Generator:
        """The generator all choices of sample `index` come from."""
        return np.random.default_rng([self.seed, 1, index])

    def make(self, rng: np.random.Generator, record: TrainingExample | str, key: SampleKey) -> Sample:
        """Return the sample `key` made from `record`; a record that is an example already is taken as it is."""
        if isinstance(record, TrainingExample):
            return Sample(record, key)
        num_tokens = self.schedule.draw(rng, key.length)
        passage = self._window(rng, record, num_tokens)
        task = _choose(rng, self._tasks[key.asks])
        kind = _choose(rng, self._text_kinds) if task in ANY_TEXT_TASKS else "plain"
        if kind != "plain":
            draw = Draw(rng, passage, num_tokens, self.reader)
            passage = cut_to_tokens(self.reader, TEXT_KINDS[kind](draw), num_tokens)
        if task in QUESTION_TASKS:
            passage = cut_to_tokens(self.reader, passage, max(1, num_tokens - FACT_TOKENS))
        return Sample(TASKS[task](rng, passage), key)

    def _window(self, rng: np.random.Generator, text: str, num_tokens: int) -> str:
        """A stretch of `text` that begins after a blank, if one is near, and holds about `num_tokens` tokens."""
        start = int(rng.integers(max(1, len(text) - num_tokens)))
        blanks = [at for at in (text.find(blank, start, start + 32) for blank in " \n") if at >= 0]
        if start and blanks:
            start = min(blanks) + 1
        ascii_chars, other_chars = _WINDOW_CHARS_PER_TOKEN
        probe = text[start : start + num_tokens]
        size = num_tokens * (ascii_chars if len(probe.encode()) < 2 * len(probe) else other_chars)
        return cut_to_tokens(self.reader, text[start : start + size], num_tokens)


class MixtureDataset(Dataset):
    """Map-style training set over files with random access; items are addressed by `SampleKey`."""

    def __init__(self, source: RecordSource, maker: ExampleMaker) -> None:
        self._source = source
        self._maker = maker

    def __len__(self) -> int:
        return self._source.num_records

    def __getitem__(self, key: SampleKey) -> Sample:
        rng = self._maker.rng(key.index)
        return self._maker.make(rng, self._source.draw(rng), key)


class StreamingMixtureDataset(IterableDataset):
    """Streaming training set: every record that comes by becomes one sample, in the lengths that `batches` plans."""

    def __init__(self, source: StreamingSource, maker: ExampleMaker, batches: LengthGroupedBatches) -> None:
        self._source = source
        self._maker = maker
        self._batches = batches

    def __iter__(self) -> Iterator[Sample]:
        records = iter(self._source)
        for batch in self._batches:
            for key in batch:
                yield self._maker.make(self._maker.rng(key.index), next(records), key)


def _check_mixture(name: str, weights: Mapping[str, float], known: Mapping[str, Any]) -> dict[str, float]:
    unknown = set(weights) - set(known)
    if unknown:
        raise ValueError(f"`{name}` knows {sorted(known)}, got {sorted(unknown)} too.")
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"`{name}` needs weights of at least 0 with a positive sum, got {dict(weights)}.")
    return {key: value / sum(weights.values()) for key, value in weights.items()}


def _choose(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    return list(shares)[int(rng.choice(len(shares), p=list(shares.values())))]
