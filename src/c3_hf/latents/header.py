"""What holds for all segments of a compressed context, and how it is read from a file's entries."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


# Types of the header's entries, as JSON gives them, by annotation.
_HEADER_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "bool | None": (bool, type(None)),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
}


@dataclass(frozen=True)
class ContextHeader:
    """What holds for all segments of a compressed context.

    Attributes:
        model: Fingerprint of the model's weights, see [`fingerprint_model`].
        tokenizer: Fingerprint of the tokenizer and restoring prompt, see [`fingerprint_processor`].
        num_latents: Latents of a segment.
        hidden_size: Width of a latent; the latents are the encoder's, from before the projector.
        segment_length: Most tokens a segment was allowed, in the encoder's vocabulary.
        target_fidelity: Token accuracy each segment was to reach, 0 to 1; `None` if none was asked for.
        exact_margin: Logit margin below which a right token is corrected too; `None` without byte-exact mode.
        min_segment_length: Tokens down to which segments were cut for `target_fidelity`; `None` without one.
        exact_check: Whether every segment was restored when it was compressed; `None` without byte-exact mode.
        model_dtype: The dtype it was computed in, such as "float32".
        text_sha256: SHA-256 of the whole source; `None` after slicing, concatenating or appending.
        source: Name of the source file, for people.
        passes: Tokens that went through encoder (and decoder, where fidelity was measured), for each token of the
            text; above 1 only with `target_fidelity`. `None` after slicing, concatenating or appending.
        writer: Package, torch version, device and dtype that computed it, for people.
    """

    model: str
    tokenizer: str
    num_latents: int
    hidden_size: int
    segment_length: int
    target_fidelity: float | None = None
    exact_margin: float | None = None
    min_segment_length: int | None = None
    exact_check: bool | None = None
    model_dtype: str | None = None
    text_sha256: str | None = None
    source: str | None = None
    passes: float | None = None
    writer: str | None = None

    @classmethod
    def from_entries(cls, entries: dict[str, Any], name: str) -> ContextHeader:
        """The header that a file called `name` holds; entries that are not known are passed over.

        Raises:
            ValueError: If an entry is missing or is not what it can be.
        """
        fields = dataclasses.fields(cls)
        missing = [
            field.name for field in fields if field.name not in entries and field.default is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"`header` lacks {missing}; {name} was not written by c3_hf.")
        known = {field.name: entries[field.name] for field in fields if field.name in entries}
        for field in fields:
            value = known.get(field.name, field.default)
            kinds = _HEADER_TYPES[str(field.type)]
            # A bool is an int to Python.
            right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            if right and isinstance(value, (int, float)) and bool not in kinds:
                # 2^40 of anything is more than a file can hold, and its square more than a tensor can.
                right = 0 <= value < math.inf if float in kinds else 0 < value < 1 << 40
            if not right:
                shown = f"{value!r:.40}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
                raise ValueError(
                    f"`header`: the entry `{field.name}` of {name} is {shown}, expected {field.type}"
                    f"{' from 1 up' if kinds[0] is int and float not in kinds else ''}: it is damaged."
                )
        return cls(**known)


def joined_header(headers: list[ContextHeader]) -> ContextHeader:
    """One header for contexts put one behind the other: the first, less what holds for one source only."""
    first = headers[0]
    targets = [header.target_fidelity for header in headers]
    shortest = [header.min_segment_length for header in headers]
    checks = [header.exact_check for header in headers]
    return dataclasses.replace(
        first,
        segment_length=max(header.segment_length for header in headers),
        target_fidelity=None if None in targets else min(target for target in targets if target is not None),
        min_segment_length=None if None in shortest else min(length for length in shortest if length is not None),
        exact_check=None if None in checks else all(checks),
        model_dtype=first.model_dtype if len({header.model_dtype for header in headers}) == 1 else None,
        text_sha256=None,
        source=None,
        passes=None,
    )
