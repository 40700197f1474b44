"""What a task hands to a system, and what it is made of: items, the meter they are cut by, lines of data files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from c3_hf.files import numbered_jsonl
from c3_hf.latents.segments import iter_segments
from c3_hf.modeling.prompt_c3 import TokenReader


# In an id, between a text and the form in which this item has it; items of one text are kept or left out together.
VARIANT = "@"


@dataclass(frozen=True)
class _Labelled:
    """What every item says of itself.

    Args:
        id: Unique within the task.
        kind: Kind of text or question, a row of the report's table.
        lang: Language code of the data, or another label where there is no language.
        source: Where the text or the contexts come from.
        bin: What the report groups by, such as a length bin or a needle's depth; empty where there is none.
    """

    id: str
    kind: str
    lang: str
    source: str
    bin: str


@dataclass(frozen=True)
class RestoreItem(_Labelled):
    """A text to give back.

    Args:
        segments: The text in reading order; each segment is restored on its own and the results are concatenated.
    """

    segments: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole reference."""
        return "".join(self.segments)

    @cached_property
    def inputs_hash(self) -> str:
        """SHA-256 of everything a system sees."""
        return _sha256(self.segments)


@dataclass(frozen=True)
class QuestionItem(_Labelled):
    """A question with contexts that hold the answer.

    Args:
        contexts: Documents in order. A system cuts one that is longer than it can take at once.
        answers: Accepted answers, at least one.
    """

    contexts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]

    @cached_property
    def inputs_hash(self) -> str:
        """SHA-256 of everything a system sees."""
        return _sha256([self.contexts, self.question])


Item = RestoreItem | QuestionItem


@dataclass(frozen=True)
class TokenMeter:
    """The checkpoint's tokenizer with the two sizes that tasks cut by.

    Args:
        tokenizer: A fast tokenizer. Text is read as text: special tokens spelled out in it do not count as such.
        num_latents: Latents of one segment.
        segment_tokens: Most tokens of one segment of a long text.
    """

    tokenizer: PreTrainedTokenizerBase
    num_latents: int
    segment_tokens: int

    @cached_property
    def reader(self) -> TokenReader:
        """Reads text with the tokenizer, and leaves it as it is."""
        return TokenReader(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.reader.read_plain([text])[0][0]

    def count(self, text: str) -> int:
        """Number of tokens of `text`."""
        return len(self.encode(text))

    def segments(self, text: str) -> list[str]:
        """`text` in segments of at most `segment_tokens` tokens, cut at sentence ends where possible, as users get."""
        return [segment.text for segment in iter_segments(text, self.reader, self.segment_tokens)]

    def cut(self, text: str, num_tokens: int) -> list[str]:
        """`text` in pieces of exactly `num_tokens` tokens (the last may be shorter), wherever that falls.

        The concatenation is `text`. A character that spans two tokens is not cut, so a piece can be a token off.

        Args:
            text: Any text; an empty one gives no pieces.
            num_tokens: Tokens of a piece, at least 1.

        Raises:
            ValueError: If `num_tokens` is smaller than 1.
        """
        if num_tokens < 1:
            raise ValueError(f"`num_tokens` is {num_tokens}, expected at least 1 token for each piece.")
        if not text:
            return []
        offsets = self.reader.read_plain([text])[0][1]
        starts = sorted({0, *(start for start, _ in offsets[::num_tokens])})
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


@dataclass(frozen=True)
class DataLine:
    """One record of a data file; what is missing or of another kind is an error that says where."""

    fields: dict[str, Any]
    where: str

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The field `name`, of the type `kind`; where it is absent or null, `default`.

        Raises:
            ValueError: If it is of another type, or absent and `default` is None.
        """
        value = self.fields.get(name)
        if value is None:
            value = default
        # True is an int to Python, and no number to whoever wrote the file.
        if value is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            what = "has no" if value is None else f"has {repr(value)[:60]} as"
            raise ValueError(f"{self.where} {what} `{name}`, expected {kinds}.")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """The field `name`, a text.

        Raises:
            ValueError: If it is none, or holds half a surrogate pair, which no tokenizer reads.
        """
        value = self.get(name, str, default)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.where}: `{name}` holds half a surrogate pair ({error.reason}).") from error
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The field `name`, a list of at least one text.

        Raises:
            ValueError: If it is none.
        """
        values = self.get(name, list)
        if not values:
            raise ValueError(f"{self.where} has an empty `{name}`, expected at least one text.")
        return tuple(DataLine({name: value}, self.where).text(name) for value in values)

    def labels(self, kind: str | None = None, bin: str | None = None) -> dict[str, str]:
        """Id, kind, language, source and bin as items have them; what the record lacks is made up from its place.

        Args:
            kind: In place of the record's own.
            bin: In place of the record's own.
        """
        file, _, number = Path(self.where).name.rpartition(" line ")
        return {
            "id": str(self.get("id", (str, int), number)),
            "kind": kind if kind is not None else self.text("kind", file.partition(".")[0]),
            "lang": self.text("lang", "-"),
            "source": self.text("source", file),
            "bin": bin if bin is not None else self.text("bin", ""),
        }


def question_of(line: DataLine, contexts: tuple[str, ...], **labels: str) -> QuestionItem:
    """The `question` of a record, with its `answers`, over `contexts`; see [`DataLine.labels`] for `labels`."""
    return QuestionItem(
        **line.labels(**labels), contexts=contexts, question=line.text("question"), answers=line.texts("answers")
    )


def read_lines(data: Path, name: str) -> list[DataLine]:
    """Records of the one file `name` in the folder `data` or below."""
    return lines_of(find_file(data, name))


def lines_of(path: Path) -> list[DataLine]:
    """Records of a JSON Lines file, compressed if its name ends in `.gz`."""
    return [DataLine(fields, f"{path} line {number}") for number, fields in numbered_jsonl(path)]


def find_file(data: Path, name: str) -> Path:
    """The one file called `name` in the folder `data` or below, or called so without its `.gz`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    found = sorted(path for wanted in {name, name.removesuffix(".gz")} for path in Path(data).rglob(wanted))
    if not found:
        raise FileNotFoundError(f"`data_dir` {str(data)!r} holds no file {name!r}, which this task reads.")
    if len(found) > 1:
        raise ValueError(
            f"`data_dir` {str(data)!r} holds {len(found)} files {name!r}, expected one; name the folder of one."
        )
    return found[0]


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
