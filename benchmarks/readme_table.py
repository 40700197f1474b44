"""Write the table of c3-tiny in README.md from the evaluation's summaries: `python -m benchmarks.readme_table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .record import ROOT
from .tables import END, between_marks


RUNS = Path(__file__).parent / "results" / "evaluation"
BEGIN = "<!-- begin: written by python -m benchmarks.readme_table -->"
# Runs by what the table calls them. All of them cut texts into the same segments.
COLUMNS = {"c3": "c3-tiny", "truncation": "as many tokens as latents", "mean-pool": "averaged embeddings as latents"}


def main() -> None:
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    summaries = {
        run: json.loads((RUNS / run / "summary.json").read_text(encoding="utf-8"))["metrics"] for run in COLUMNS
    }
    page.write_text(between_marks(text, BEGIN, f"\n\n{table(summaries)}\n\n", END), encoding="utf-8")


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """A line a task: ratio and characters a latent, mean character precision and how many texts came back exactly."""
    lines = [
        "| text | texts | ratio | characters a latent | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for task, groups in summaries["c3"].items():
        measured = groups["all"]
        cells = [
            f"{summary[task]['all']['char_precision']:.2%}, {summary[task]['all']['exact_match']:.0%} exact"
            if task in summary
            else "not measured"
            for summary in summaries.values()
        ]
        ratio = f"{measured['compression_ratio']:.1f}x"
        characters = f"{measured['characters_a_slot']:.1f}"
        head = [task.replace("_", " "), str(measured["items"]), ratio, characters]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
