"""Texts and numbers as HTML. Whatever a user wrote is text in it, never markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from itertools import groupby

from rapidfuzz.distance import Levenshtein
from transformers import PretrainedConfig

from ..latents.decoding import cache_bytes
from ..latents.rendering import AFTER_ERROR, CERTAIN, CLOSE, WRONG, heat_segments
from ..pipeline import C3Pipeline
from .study import Study, Trial


# Characters of a text that are drawn; the figures are of all of it.
SHOWN = 20_000
# Characters kept at each end of a long stretch in which nothing differs.
_CONTEXT = 160
# Segments that were not read and are drawn beside those that were.
_MOST_UNREAD = 100
# Parts of the bar that stands for a whole text.
_PARTS = 240
# The page is filled in by templates, in which these characters would count.
_TEMPLATE = {ord(character): f"&#{ord(character)};" for character in "{}$`\\"}
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|\s+|.", re.DOTALL)
# A word that was cut in two, at an end or a start.
_SPLIT_END, _SPLIT_START = re.compile(r"(?<=\s)\S{1,20}$"), re.compile(r"^\S{1,20}(?=\s)")
_KINDS = {CERTAIN: "sure", CLOSE: "expected", AFTER_ERROR: "expected", WRONG: "wrong"}
_WORST = ("sure", "expected", "wrong")
_LEGEND = (
    '<p class="c3-legend"><span class="c3-sure">certain to come back</span> '
    '<span class="c3-expected">expected: right while all before it is, or by a narrow margin</span> '
    '<span class="c3-wrong">wrong</span></p>'
)


_BLOCK_END = '<span class="c3-cut" title="one block of latents ends here"></span>'
_RESTORED = "<h3>Restored from the latents alone</h3>"


def escape(text: str) -> str:
    """A user's text as HTML that shows it, to the letter."""
    return html.escape(text).translate(_TEMPLATE)


def notice(text: str, kind: str = "note") -> str:
    """A line of the page's own; an error is read out at once."""
    return f'<p class="c3-notice c3-{kind}" role="{"alert" if kind == "error" else "status"}">{escape(text)}</p>'


FORGETTING = (
    "<p>The beginning of the text is put into one block of latents, at a higher and higher ratio, and restored. "
    "Tokens are those of the model's own vocabulary.</p>"
)
BEGINNING = "In the sample “Note”, for example: The access code of the depot at Trieste is"
PRIVACY = (
    '<p class="c3-small">Your text stays in the memory of this page until you leave it, half an hour at most. An '
    "uploaded file is deleted when it has been read. Nothing is written down, and nothing is sent anywhere else.</p>"
)


def heading(pipe: C3Pipeline) -> str:
    """What the page is about, and what model it shows."""
    return (
        "<h1>What is left of a text in a few latents</h1>"
        f"<p>C3 reads a text and leaves {pipe.model.config.num_latents} vectors for each stretch of it; a decoder "
        "restores the text, or answers, from those alone. See which words come back, and where it ends.</p>"
        f'<p class="c3-small">{escape(pipe.describe())}.</p>'
    )


def credit(words: str) -> str:
    """Where a sample is from."""
    return f'<p class="c3-small">{escape(words)}</p>'


def ratios(usual: int, most: int) -> str:
    """What there is to choose among tokens for each latent."""
    more = ", its most." if usual == most else ". The more, the smaller, until it fails."
    return f"The model was made for {usual}{more}"


def abilities(prompts: dict[str, str]) -> str:
    """What a checkpoint with these prompts can be asked."""
    if "ask" in prompts:
        return notice("This model was trained to answer questions about a text it has compressed.")
    if "find" in prompts:
        return notice(
            "This model was not trained to answer questions. It goes on from words of the text: what it writes is "
            "compared with the text and counts as far as it stands there."
        )
    return notice("This model was trained to give texts back and cannot be asked about them.")


def fidelity(pipe: C3Pipeline, study: Study) -> str:
    """The text in the colours of what its latents bring back, known before anything is restored."""
    if study.text is None or study.context.margins is None:
        return notice("What is certain beforehand is known where a text is compressed here; a file holds none.")
    pieces, strip, used = [], [], 0
    for _, heat in heat_segments(study.context, [study.text], pipe.processor):
        for piece in heat:
            strip.append((_KINDS[piece.kind], len(piece.text)))
            if used < SHOWN:
                pieces.append(_span(_KINDS[piece.kind], piece.text))
                used += len(piece.text)
        pieces.append(_BLOCK_END if used < SHOWN else "")
    body = f'<div class="c3-text c3-tall" tabindex="0"><div>{"".join(pieces)}</div></div>'
    title = "<h3>Known beforehand, from the latents and the text</h3>"
    return f"{title}{_LEGEND}{_strip(strip)}{body}{_beginning(used, len(study.text))}"


def _strip(kinds: Sequence[tuple[str, int]]) -> str:
    """The whole text as a bar, from its beginning to its end, each part in the colour of the worst in it."""
    spread = [_WORST.index(kind) for kind, size in kinds for _ in range(size)]
    parts = min(_PARTS, len(spread))
    worst = [max(spread[part * len(spread) // parts : (part + 1) * len(spread) // parts]) for part in range(parts)]
    cells = "".join(f'<i class="c3-{_WORST[kind]}" style="flex:{len(list(run))}"></i>' for kind, run in groupby(worst))
    return f'<div class="c3-strip" role="img" aria-label="the whole text by its colours">{cells}</div>'


def differences(study: Study) -> str:
    """What was compressed and what came back side by side; where the two are equal, once."""
    if study.text is None:
        return _RESTORED + _unknown(study)
    done = len(study.restored)
    rows, used, equal = [], 0, 0
    for number, (want, (got, _)) in enumerate(zip(study.segments, study.restored)):
        if want == got:
            equal += 1
            continue
        if used < SHOWN:
            left, right = _sides(want, got)
            rows.append(
                f'<div class="c3-pair"><div class="c3-half"><h4>Segment {number}: original</h4>'
                f'<div class="c3-text" tabindex="0">{left}</div></div><div class="c3-half"><h4>restored</h4>'
                f'<div class="c3-text" tabindex="0">{right}</div></div></div>'
            )
        used += len(want)
    if not rows:
        words = f"{'All ' if done > 1 else ''}{counted(done, 'segment')} came back identical, every character."
        return _RESTORED + notice(words, "good")
    left_out = done - equal - len(rows)
    more = f" {counted(left_out, 'further segment')} not drawn." if left_out else ""
    same = f"{equal} of {counted(done, 'segment')} came back identical; what differs is shown.{more}"
    return f"{_RESTORED}{notice(same)}{''.join(rows)}"


def _unknown(study: Study) -> str:
    """What came back of a file, of which only the digests say whether it is right."""
    shown, used = [], 0
    for number, (text, exact) in enumerate(study.restored):
        if used < SHOWN:
            shown.append(
                f'<div class="c3-half"><h4>Segment {number}: {"exact, by its digest" if exact else "not exact"}</h4>'
                f'<div class="c3-text{"" if exact else " c3-doubt"}" tabindex="0">{escape(text)}</div></div>'
            )
        used += len(text)
    left_out = len(study.restored) - len(shown)
    return "".join(shown) + (notice(f"{counted(left_out, 'further segment')} not drawn.") if left_out else "")


def _sides(want: str, got: str) -> tuple[str, str]:
    """Both texts, compared word by word, with what is only in one marked."""
    a, b = _WORD.findall(want), _WORD.findall(got)
    left, right = [], []
    for edit in Levenshtein.opcodes(a, b):
        lost, new = "".join(a[edit.src_start : edit.src_end]), "".join(b[edit.dest_start : edit.dest_end])
        equal = edit.tag == "equal"
        left.append(_shortened(lost) if equal else _span("lost", lost))
        right.append(_shortened(new) if equal else _span("wrong", new))
    return "".join(left), "".join(right)


def _shortened(text: str) -> str:
    """The two ends of a stretch in which there is nothing to see, cut between words where there are spaces."""
    if len(text) < 3 * _CONTEXT:
        return escape(text)
    first, last = _SPLIT_END.sub("", text[:_CONTEXT]), _SPLIT_START.sub("", text[-_CONTEXT:])
    left_out = len(text) - len(first) - len(last)
    return f'{escape(first)}<span class="c3-gap">… {left_out:,} characters …</span>{escape(last)}'


def figures(config: PretrainedConfig, study: Study, calibrated: bool) -> str:
    """The numbers of a study: what the decoder is spared, what came back, and the time."""
    context = study.context
    # The markers around a block take a slot each.
    latents, slots = context.total_latents, context.total_latents + 2 * len(context)
    characters, tokens = context.num_characters, context.num_tokens
    size = 2 if context.header.model_dtype in ("bfloat16", "float16") else 4
    full, small = (cache_bytes(config.text_config, 1, length, size) for length in (tokens, slots))
    shown = [
        ("characters a latent", f"{characters / latents:.1f}", f"{tokens / latents:.1f} tokens"),
        ("decoder slots", f"{slots:,}", f"in place of {tokens:,}"),
        ("key-value memory", _bytes(small), f"in place of {_bytes(full)}"),
    ]
    if study.restored and study.text is not None:
        exact = f"{study.num_exact} of {counted(len(study.restored), 'segment')} exact"
        shown.append(("came back", f"{_percent(study.precision)} %", exact))
    elif study.restored:
        shown.append(("exact", f"{study.num_exact} of {len(study.restored)}", "segments, by their digests"))
    if context.margins is not None:
        sizes = context.token_offsets.diff().tolist()
        mean = sum(each * size for each, size in zip(context.expected_precision(), sizes)) / max(sum(sizes), 1)
        word = "expected" if calibrated else "at least expected"
        shown.append((word, f"{_percent(mean)} %", "before restoring"))
    seconds = study.compress_seconds + study.restore_seconds
    shown.append(
        ("seconds", f"{seconds:.1f}", f"compress {study.compress_seconds:.1f}, restore {study.restore_seconds:.1f}")
    )
    cards = (f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in shown)
    return f'<dl class="c3-figures">{"".join(cards)}</dl>'


def segments_read(texts: Sequence[str], read: Sequence[int], answer: str = "") -> str:
    """The text with the segments marked that the model had in front of it, and the answer where it stands in one."""
    pieces = []
    for number, text in enumerate(texts):
        if number in read:
            shown = escape(text)
            if answer and answer in text:
                before, behind = text.split(answer, 1)
                shown = f"{escape(before)}<u>{escape(answer)}</u>{escape(behind)}"
            pieces.append(f'<mark class="c3-read"><b>read: segment {number}</b> {shown}</mark>')
        elif number < _MOST_UNREAD:
            pieces.append(f"<span>{_shortened(text)}</span>")
    return f'<div class="c3-text" tabindex="0">{"".join(pieces)}</div>'


def trials(title: str, rows: Sequence[Trial]) -> str:
    """Ratio by position as a table whose cells are the darker the more came back."""
    cells = "".join(f"<th>{tenth * 10}</th>" for tenth in range(1, 11))
    lines = []
    for row in rows:
        parts = "".join(
            "<td>–</td>"
            if value is None
            else f'<td style="--c3-part:{100 * value:.0f}%" class="{"c3-most" if value > 0.6 else ""}">'
            f"{100 * value:.0f}</td>"
            for value in row.by_position
        )
        lines.append(f'<tr><th scope="row">{row.ratio:.3g}×</th><td><b>{_percent(row.precision)}</b></td>{parts}</tr>')
    head = "<tr><th>tokens a latent</th><th>all, %</th>"
    head += '<th colspan="10">tokens that came back, %, by place in the block</th></tr>'
    head += f"<tr><th></th><th></th>{cells}</tr>"
    return f'<table class="c3-trials"><caption>{escape(title)}</caption><thead>{head}</thead>{"".join(lines)}</table>'


def _percent(share: float) -> str:
    """In percent; what is not all never shows as 100."""
    return "100" if share == 1 else f"{min(100 * share, 99.99):.2f}" if share > 0.999 else f"{100 * share:.1f}"


def _span(kind: str, text: str) -> str:
    return f'<span class="c3-{kind}">{escape(text)}</span>' if text else ""


def _beginning(shown: int, total: int) -> str:
    return notice(f"Drawn: the first {shown:,} of {total:,} characters.") if shown < total else ""


def counted(number: int, thing: str) -> str:
    """A number of things, with an s where there are several or none."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
