"""Write the tables of docs/performance.md from the records: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .record import ROOT


RESULTS = Path(__file__).parent / "results" / "speed"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.tables -->", "<!-- end -->"


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_tables(text, read_records(RESULTS)), encoding="utf-8")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, in the order of their names."""
    return [
        {**json.loads(path.read_text(encoding="utf-8")), "file": path.name} for path in sorted(folder.glob("*.json"))
    ]


def with_tables(document: str, records: Iterable[dict[str, Any]]) -> str:
    """`document` with the tables of `records` between the two marks.

    Raises:
        ValueError: if the marks are missing.
    """
    return between_marks(document, BEGIN, "\n\n" + "\n\n".join(render(record) for record in records) + "\n\n", END)


def between_marks(document: str, begin: str, content: str, end: str) -> str:
    """`document` with what stands between the marks `begin` and `end` replaced by `content`.

    Raises:
        ValueError: if the marks are missing.
    """
    if begin not in document or end not in document:
        raise ValueError(f"the document must hold the marks {begin!r} and {end!r}.")
    head, rest = document.split(begin, 1)
    return head + begin + content + end + rest.split(end, 1)[1]


def render(record: dict[str, Any]) -> str:
    """Heading, origin and table of one record."""
    model, machine = record["model"], record["environment"]
    sizes = " + ".join(f"{model[f'{half}_parameters'] / 1e6:,.0f} M" for half in ("encoder", "decoder"))
    rates = record["floors"]
    # A word, or the fingerprint of trained ones.
    weights = f"weights `{model['weights'][:8]}`" if len(model["weights"]) == 64 else f"{model['weights']} weights"
    origin = (
        f"{sizes} parameters, {weights}, {model['dtype']}, {machine['device_name']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}; matrix "
        f"product {rates['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s, copy {rates['copy_bytes_per_s'] / 1e9:,.1f} GB/s. "
        f"Record: [{record['file']}](../benchmarks/results/speed/{record['file']})."
    )
    columns = COLUMNS[record["benchmark"]]
    tables = [
        table([row for row in record["measurements"] if row.get("what") == what], columns[what])
        for what in columns
        if any(row.get("what") == what for row in record["measurements"])
    ]
    return "\n\n".join([f"### {record['benchmark']}, {model['name']}, {machine['device']}", origin, *tables])


Column = tuple[str, Callable[[dict[str, Any]], str]]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """A Markdown table."""
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[show(row) for _, show in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plain(name: str) -> Column:
    return name.replace("_", " "), lambda row: f"{row[name]:,}" if type(row[name]) is int else str(row[name])


def number(title: str, path: str, form: str = ",.1f", factor: float = 1.0) -> Column:
    """A number found along a dotted path; of a spread, the median and the range."""

    def show(row: dict[str, Any]) -> str:
        value: Any = row
        for key in path.split("."):
            value = value.get(key) if value is not None else None
        if value is None:
            return "–"
        if isinstance(value, dict):
            low, middle, high = (format(factor * value[key], form) for key in ("min", "median", "max"))
            return middle if low == high else f"{middle} ({low}–{high})"
        return format(factor * value, form)

    return title, show


COLUMNS: dict[str, dict[str | None, list[Column]]] = {
    "against_original": {
        None: [
            plain("context_length"),
            plain("batch_size"),
            plain("new_tokens"),
            number("C3 tokens/s", "c3_tokens_per_s"),
            number("original tokens/s", "original_tokens_per_s"),
            number("× faster", "speedup"),
            number("C3 peak MB", "c3_peak_bytes", ",.0f", 1e-6),
            number("original peak MB", "original_peak_bytes", ",.0f", 1e-6),
        ]
    },
    "against_full_text": {
        None: [
            plain("text_length"),
            number("prompt tokens, text", "prompt_tokens.full", ",d", 1),
            number("latents", "prompt_tokens.latents", ",d", 1),
            number("first token s, text", "seconds.full_first", ",.3f"),
            number("kept latents", "seconds.latents_first", ",.3f"),
            number("× faster, kept", "first_token_speedup_stored"),
            number("× faster, made now", "first_token_speedup_fresh"),
            number("tokens/s, text", "decode_tokens_per_s.full"),
            number("latents", "decode_tokens_per_s.latents"),
            number("cache MB, text", "cache_bytes.full", ",.1f", 1e-6),
            number("latents", "cache_bytes.latents", ",.1f", 1e-6),
            number("break-even questions", "break_even_questions", ",.2f"),
        ]
    },
    "against_hardware": {
        "encode": [
            plain("context_length"),
            plain("batch_size"),
            number("encode s", "seconds", ",.4f"),
            number("floor s", "floor_s", ",.4f"),
            number("% of the matmul rate", "utilization", ",.0f", 100),
        ],
        "decode": [
            plain("batch_size"),
            number("decode step ms", "step_s", ",.2f", 1e3),
            number("floor ms", "floor_s", ",.2f", 1e3),
            number("% of the floor", "utilization", ",.0f", 100),
        ],
    },
    "restoring": {
        None: [
            plain("segments"),
            plain("batch_size"),
            number("mixed lengths, tokens/s", "tokens_per_s.mixed"),
            number("equal lengths", "tokens_per_s.equal"),
            number("one segment", "tokens_per_s.single"),
            number("mixed / equal", "mixed_over_equal", ",.2f"),
            number("mixed / one", "mixed_over_single", ",.2f"),
        ]
    },
    "drafting": {
        None: [
            plain("kind"),
            plain("draft"),
            plain("new_tokens"),
            number("tokens a pass", "tokens_per_pass", ",.2f"),
            number("× faster", "speedup", ",.2f"),
            plain("same_tokens"),
        ]
    },
    "scaling": {
        None: [
            plain("tokens"),
            number("compress s", "seconds", ",.2f"),
            number("tokens/s", "tokens_per_s", ",.0f"),
            number("time exponent", "time_exponent", ",.2f"),
            number("latents MB", "latents_bytes", ",.1f", 1e-6),
            number("memory beyond them MB", "peak_bytes_beyond_latents", ",.0f", 1e-6),
        ]
    },
    "start_up": {
        "import": [
            number("auto classes s", "auto_classes_s", ",.2f"),
            number("with c3_hf s", "c3_hf_s", ",.2f"),
            number("ratio", "ratio", ",.2f"),
        ],
        "load": [
            number("weights MB", "weights_bytes", ",.0f", 1e-6),
            number("load s", "load_s", ",.2f"),
            number("and read s", "load_and_read_s", ",.2f"),
            number("peak / weights", "peak_over_weights", ",.2f"),
        ],
        "convert": [
            number("weights MB", "weights_bytes", ",.0f", 1e-6),
            number("convert s", "convert_s", ",.2f"),
            number("peak MB", "peak_bytes", ",.0f", 1e-6),
            number("peak / weights", "peak_over_weights", ",.2f"),
        ],
    },
}


if __name__ == "__main__":
    main()
