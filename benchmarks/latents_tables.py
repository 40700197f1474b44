"""Put what the records of compressed contexts say into docs/contexts.md: `python -m benchmarks.latents_tables`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .latents_setup import RESULTS
from .tables import between_marks


PAGE = Path(__file__).parents[1] / "docs" / "contexts.md"
START, END = "<!-- records -->\n", "<!-- end of records -->\n"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between_marks(page, START, "".join(sections(RESULTS)), END), encoding="utf-8")
    return 0


def sections(folder: Path) -> Iterator[str]:
    """A paragraph and table for each record that is there."""
    for name, section in SECTIONS.items():
        for path in sorted(folder.glob(f"latents_{name}.*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            yield section(record["measurements"], record)
            weights = record["model"]["weights"][:8]
            link = f"[{path.name}](../benchmarks/results/{path.name})"
            yield f"Record: {link}, {record['date'][:10]}, weights `{weights}`.\n\n"


def exact(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    left = record["settings"]["kinds_left"]
    stopped = f" The run was stopped; {left} kinds were not reached." if left else ""
    # Without the check a segment that fails would be an error when it is restored, and the run would end.
    is_checked = not record["settings"].get("no_check", record["settings"].get("books"))
    model = f"{record['settings']['dtype']}, segments of up to {record['settings']['segment_length']} tokens"
    lines = [f"**Byte-exact mode** ({model}). Sources restored byte for byte, and what that took.{stopped}\n"]
    lines += ["| text | identical | tokens | residual bits a token | wrong tokens | near ties | stored as bytes |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        stored = row["stored_smaller"] + row["stored_unreadable"] + row["stored_failed"]
        failed = f" ({row['stored_failed']:,} because restoring failed)" if is_checked else ""
        lines.append(
            f"| {row['kind']} | {row['identical']:,} of {row['sources']:,} | {row['tokens']:,} | "
            f"{row['residual_bits_a_token']:.3f} | {row['wrong_tokens']:,} | {row['near_tokens']:,} | "
            f"{stored:,} of {row['segments']:,} segments{failed} |"
        )
    noise = record["settings"]["margin_noise"]
    lines += ["", f"Margins move by at most {noise['largest']:.1e} logits between batch sizes.", ""]
    return "\n".join(lines)


def fidelity(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    total = rows[0]
    lines = [
        f"**Fidelity.** {total['certainly_exact']:,} of {total['segments']:,} segments were certain to come back, "
        f"{total['of_those_exact']:,} of them did; {total['prefixes_not_kept']:,} certain prefixes were not kept. "
        f"Calibration: derail {total['derail']}, floor {total['floor']}, tested on the half it was not fitted on:\n",
        "| held-out segments | expected precision | precision | difference, points |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "expected_precision" in row:
            name = row.get("kind") or (f"{row['length']} tokens" if "length" in row else "all")
            values = (100 * row["expected_precision"], 100 * row["precision"], row["difference_points"])
            if "token_accuracy" in row and "certain_prefix" not in row:
                lines.append(f"| {name} | {values[0]:.2f} | {values[1]:.2f} | {values[2]:+.2f} |")
    lines += ["", "| latents stored as | token accuracy | bytes |", "|---|---|---|"]
    lines += [
        f"| {row['dtype']} | {row['token_accuracy']:.4f} | {row['latent_bytes']:,} |" for row in rows if "dtype" in row
    ]
    return "\n".join([*lines, "", "![Expected and seen precision](images/fidelity_calibration.png)", ""])


def target(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    lines = [
        f"**Target fidelity**, model {record['model']['name']}: latents, and what the best fixed length needs for as "
        "good a worst segment, and for as many right tokens. Segments below the target reach it at no length.\n",
        "| document | target | worst segment | tokens right | latents | fixed, same worst | fixed, as many right "
        "| passes | below target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "target" in row:
            fixed = [row["fixed_latents_for_the_same_worst"], row["fixed_latents_for_as_many_right"]]
            lines.append(
                f"| {row['document']} | {row['target']} | {row['worst_segment']:.4f} | {row['tokens_right']:.4f} | "
                f"{row['latents']:,} | {' | '.join('none does' if one is None else f'{one:,}' for one in fixed)} | "
                f"{row['passes']:.2f} | {row['below_target']} of {row['segments']} |"
            )
    return "\n".join([*lines, ""])


def scaling(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    lines = ["**Any length.**\n", "| tokens | seconds | tokens a second | time exponent | peak memory, MB |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        exponent = f"{row['time_exponent']:.3f}" if "time_exponent" in row else "-"
        lines.append(
            f"| {row['tokens']:,} | {row['seconds']:.1f} | {row['tokens_per_s']:,.0f} | {exponent} | "
            f"{row['peak_bytes'] / 1e6:,.0f} |"
        )
    return "\n".join([*lines, ""])


def kill(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    total = rows[0]
    return (
        f"**Kill and resume.** {total['kills']} times SIGKILL at random moments over {total['finished_files']} files: "
        f"{total['groups_lost']} finished groups lost, every file restored byte for byte.\n\n"
    )


def questions(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    lines = [
        "**Questions a second** to one text.\n",
        "| segments | stored, opened each time | stored, in memory | text |",
    ]
    lines += ["|---|---|---|---|"]
    for row in rows:
        rates = [value["median"] for value in row["questions_per_s"].values()]
        lines.append(f"| {row['segments']} | " + " | ".join(f"{rate:.2f}" for rate in rates) + " |")
    return "\n".join([*lines, ""])


SECTIONS = {
    "exact": exact,
    "fidelity": fidelity,
    "target": target,
    "scaling": scaling,
    "kill": kill,
    "questions": questions,
}


if __name__ == "__main__":
    sys.exit(main())
