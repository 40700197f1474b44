"""The worst items with their differences in colour, as one HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from rapidfuzz.distance import Levenshtein


# Words, runs of blanks, and everything else character by character: units a reader compares by.
_UNIT = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\S\n]+|.", re.DOTALL)
# Characters that HTML would not show, as their Unicode control pictures.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.05rem; margin: 2.5rem 0 .25rem; overflow-wrap: anywhere; }}
.facts {{ color: #555; margin: 0 0 .5rem; font-size: .9rem; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; border-left: 4px solid #bbb;
  padding: .75rem 1rem; font-family: ui-monospace, monospace; font-size: .85rem; }}
del {{ background: #fbd5d5; color: #8c1111; }}
ins {{ background: #d3f0d9; color: #0b5a20; text-decoration: underline; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{lead} <del>Struck out red</del> is in the original and did not come back; <ins>underlined green</ins> came back
and is not in the original.</p>
{sections}
</body>
</html>
"""


def worst_items(records: Iterable[dict], count: int) -> list[dict]:
    """The `count` restored items of lowest `char_precision` whose texts are kept, worst first."""
    shown = [record for record in records if record.get("reference")]
    return sorted(shown, key=lambda record: (record["metrics"]["char_precision"], record["task"], record["id"]))[
        :count
    ]


def receipts_page(title: str, records: list[dict], total: int) -> str:
    """An HTML page, without anything from outside it, that shows `records`, the worst of `total` restored items."""
    lead = f"The {len(records)} of {total} restored items with the lowest character precision."
    return _PAGE.format(title=html.escape(title), lead=lead, sections="\n".join(map(_section, records)))


def difference(reference: str, output: str) -> str:
    """HTML of `reference` turned into `output`: deletions in `<del>`, insertions in `<ins>`."""
    old, new = _UNIT.findall(reference), _UNIT.findall(output)
    parts = []
    for block in Levenshtein.opcodes(old, new):
        removed = "".join(old[block.src_start : block.src_end])
        added = "".join(new[block.dest_start : block.dest_end])
        if block.tag == "equal":
            parts.append(_visible(removed))
        else:
            parts += [f"<del>{_visible(removed, True)}</del>"] if removed else []
            parts += [f"<ins>{_visible(added, True)}</ins>"] if added else []
    return "".join(parts)


def _visible(text: str, changed: bool = False) -> str:
    """Escaped text; a changed line break is marked, since its colour cannot be seen."""
    shown = html.escape(text.translate(_PICTURES))
    return shown.replace("\n", "\u21b5\n") if changed else shown


def _section(record: dict) -> str:
    metrics = record["metrics"]
    facts = " &middot; ".join(
        [
            html.escape(record["kind"]),
            f"{record['num_tokens']} tokens in {record['slots']} slots",
            f"char_precision {metrics['char_precision']:.4f}",
            f"fox_precision {metrics['fox_precision']:.4f}",
            f"length ratio {metrics['length_ratio']:.2f}",
            f"first error at {metrics['first_error_position']:.0%}",
            html.escape(record["source"]),
        ]
    )
    name = html.escape(f"{record['task']} / {record['id']}")
    # A text that came back whole is kept once.
    output = record["reference"] if record["output"] is None else record["output"]
    shown = difference(record["reference"], output)
    return f'<section>\n<h2>{name}</h2>\n<p class="facts">{facts}</p>\n<div class="text">{shown}</div>\n</section>'
