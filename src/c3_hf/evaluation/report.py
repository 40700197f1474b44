"""Tables, plots and receipts of finished runs."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from c3_hf.evaluation import plots
from c3_hf.evaluation.plots import FIGURE_1, FIGURE_1_BINS
from c3_hf.evaluation.records import FinishedRun, by, count, mean, mean_of, ratio, values, with_interval
from c3_hf.files import atomic_file


_ANSWER_METRICS = ("contains_answer", "best_subspan_match", "answer_f1")
# Official pages if they were run, else the look-alikes.
_ENGLISH_PAGES = ("fox_en", "foxlike_en")
_MAX_CURVES = 7

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


def write_report(folders: Sequence[Path], output: Path, receipts: int = 10) -> Path:
    """Write `report.md`, its pictures and `receipts.html`.

    Args:
        folders: Output folders of finished runs; kinds and receipts are shown for the first one that ran.

    Returns:
        The path of `report.md`.

    Raises:
        FileNotFoundError: If a folder holds no run.
        ValueError: If a run is not finished, two have one name, or none has items.
    """
    runs = [FinishedRun.read(Path(folder)) for folder in folders]
    if len({run.label for run in runs}) < len(runs):
        raise ValueError(f"`runs` has folders of one name, {[run.label for run in runs]}; the name is a run's label.")
    shown = [run for run in runs if run.records]
    if not shown:
        raise ValueError("`runs` has no run with items: " + "; ".join(f"{run.label}: {run.skipped}" for run in runs))
    output.mkdir(parents=True, exist_ok=True)
    sections = [
        _runs_section(runs),
        _tasks_section(shown),
        _figure_1_section(shown, output),
        _ratio_section(shown, output),
        _forgetting_section(shown, output),
        _kinds_section(shown[0], output),
        _questions_section(shown),
        _receipts_section(shown[0], output, receipts),
    ]
    text = "# Evaluation report\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    path = output / "report.md"
    _write(path, text)
    return path


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _mean(metric: str, digits: int = 3) -> Callable[[list[dict]], str]:
    return lambda records: f"{mean(values(records, metric)):.{digits}f}"


def _interval(metric: str, digits: int = 3) -> Callable[[list[dict]], str]:
    return lambda records: with_interval(records, metric, digits)


# Columns by their headers: what each shows of the records of a row, or of a run.
_SIZES: dict[str, Callable[[list[dict]], str]] = {
    "items": count,
    "ratio": lambda records: f"{ratio(records):.1f}×",
    "characters a slot": lambda records: f"{ratio(records, 'num_characters'):.1f}",
}
_RESTORED = {
    **_SIZES,
    "char_precision": _interval("char_precision"),
    "fox_precision": _interval("fox_precision"),
    "exact": _mean("exact_match"),
    "CER": _mean("character_error_rate"),
    "token acc.": _mean("token_accuracy"),
    "ROUGE-L": _mean("rouge_l"),
    "BLEU": _mean("bleu"),
    "length": _mean("length_ratio"),
    "first error": _mean("first_error_position"),
}
_OF_A_KIND = {
    **_SIZES,
    "char_precision": _interval("char_precision"),
    "fox_precision": _mean("fox_precision"),
    "exact": _mean("exact_match", 2),
}
_ANSWERED = {**_SIZES, **{metric: _interval(metric, 2) for metric in _ANSWER_METRICS}}
_RUN: dict[str, Callable[[FinishedRun], str]] = {
    "run": lambda run: run.label,
    "system": lambda run: run.config["settings"]["system"] + (f", skipped: {run.skipped}" if run.skipped else ""),
    "checkpoint": lambda run: run.config["settings"]["model"],
    "weights": lambda run: f"`{run.config['weights'][:12]}`" if run.config["weights"] else "hub",
    "commit": lambda run: f"`{run.config['commit'][:12]}`" if run.config["commit"] else "unknown",
    "items": lambda run: str(len(run.records)),
    "seconds": lambda run: f"{sum(record['seconds'] for record in run.records):.0f}",
    "text in": lambda run: _blocks(run) if run.config["settings"]["cut"] else "one block",
    "contexts in": lambda run: _blocks(run),
    "texts a task": lambda run: str(run.config["settings"]["limit"] or "all"),
}


def _blocks(run: FinishedRun) -> str:
    return f"blocks of {run.config['segment_tokens']} tokens"


def _row(columns: Mapping[str, Callable[[Any], str]], shown: Any) -> list[str]:
    return [show(shown) for show in columns.values()]


def _runs_section(runs: Sequence[FinishedRun]) -> str:
    rows = [_row(_RUN, run) for run in runs]
    environment = runs[0].config["environment"]
    commits, weights = ({run.config[key] for run in runs} for key in ("commit", "weights"))
    mixed = ""
    if len(commits) > 1 or any(str(commit).endswith("+") for commit in commits) or len(weights) > 1:
        changed = sum(str(commit).endswith("+") for commit in commits)
        mixed = (
            f"**Not of one measurement:** these runs were made at {len(commits)} commits"
            f"{f', {changed} of them with changes that were not committed' if changed else ''}, "
            f"of {len(weights)} sets of weights.\n\n"
        )
    versions = ", ".join(f"{name} {version}" for name, version in environment.items())
    return (
        "## Runs\n\n"
        "Numbers in brackets are 95 % bootstrap intervals of the mean over items. What every number means: "
        "`docs/evaluation.md`. The ratio is tokens of the checkpoint's own vocabulary a slot: a small vocabulary cuts "
        "a text into more tokens, so that models with different ones compare by characters a slot.\n\n"
        f"{mixed}{table(list(_RUN), rows)}\n\nFirst run's environment: {versions}. METEOR: {runs[0].config['meteor']}."
    )


def _tasks_section(runs: Sequence[FinishedRun]) -> str:
    tasks = dict.fromkeys(record["task"] for run in runs for record in run.restored())
    shown = [(task, run.label, records) for task in tasks for run in runs if (records := run.of(task))]
    rows = [[task, label, *_row(_RESTORED, records)] for task, label, records in shown]
    return f"## Restoring\n\n{table(['task', 'run', *_RESTORED], rows)}" if rows else ""


def _figure_1_section(runs: Sequence[FinishedRun], output: Path) -> str:
    pages = next((kind for kind in _ENGLISH_PAGES if any(run.of("fox_pages", kind=kind) for run in runs)), None)
    if pages is None:
        return ""
    plots.plot_figure_1(runs, pages, output / "figure_1.png")
    measured = [run for run in runs if run.of("fox_pages", kind=pages)]
    header = ["page tokens", *(f"published: {name}" for name in FIGURE_1)]
    header += [f"{run.label}: {name}" for run in measured for name in ("pages", "fox_precision", "char_precision")]
    rows = []
    for place, label in enumerate(FIGURE_1_BINS):
        row = [label, *(f"{percents[place]:.1f}" for percents in FIGURE_1.values())]
        for run in measured:
            records = run.of("fox_pages", kind=pages, bin=label)
            row.append(f"{count(records)} ({ratio(records):.1f}×)" if records else "0")
            row += [
                f"{100 * mean(values(records, metric)):.1f}" if records else "–"
                for metric in ("fox_precision", "char_precision")
            ]
        rows.append(row)
    what = "the official pages" if pages == "fox_en" else "look-alike pages, which are not those of the paper"
    return (
        f"## The paper's Fig. 1\n\nPercent. Published columns: arXiv 2511.15244, Fox English pages. Ours: {what} "
        f"(`{pages}`), the ratio in brackets; a run that cuts pages into blocks works at a lower ratio than the "
        f"published columns (21× to 39× for 32 latents) and is not to be compared with them point by point.\n\n"
        f"{table(header, rows)}\n\n![Precision by page length](figure_1.png)"
    )


def _ratio_section(runs: Sequence[FinishedRun], output: Path) -> str:
    measured = [run for run in runs if run.of("ratio_sweep")]
    if not measured:
        return ""
    plots.plot_ratio(measured, output / "ratio.png")
    labels = sorted({record["bin"] for run in measured for record in run.of("ratio_sweep")}, key=lambda b: int(b[:-1]))
    rows = [
        [
            label.replace("x", "×"),
            *(
                with_interval(records, "char_precision") if (records := run.of("ratio_sweep", bin=label)) else "–"
                for run in measured
            ),
        ]
        for label in labels
    ]
    return (
        "## Precision against ratio\n\n`char_precision` of the same texts, cut into shorter or longer segments.\n\n"
        f"{table(['ratio', *(run.label for run in measured)], rows)}\n\n![Precision against ratio](ratio.png)"
    )


def _forgetting_section(runs: Sequence[FinishedRun], output: Path) -> str:
    restored = [run for run in runs if run.restored()]
    if not restored:
        return ""
    # The ratio sweep mixes ratios, and a curve is of one.
    counts = {task: len(rows) for task, rows in by(restored[0].restored(), lambda record: record["task"]).items()}
    counts.pop("ratio_sweep", None)
    tasks = sorted(sorted(counts, key=lambda task: -counts[task])[:_MAX_CURVES])
    restored = [run for run in restored if any(run.of(task) for task in tasks)]
    if not restored:
        return ""
    plots.plot_forgetting(restored, tasks, output / "forgetting.png")
    rows = []
    for run in restored:
        for task in tasks:
            curves = [{"curve": record["metrics"]["accuracy_by_position"]} for record in run.of(task)]
            if curves:
                shown = ["–" if value is None else f"{value:.2f}" for value in mean_of(curves)["curve"]]
                rows.append([task, run.label, *shown])
    header = ["task", "run", *(f"{10 * place}–{10 * place + 10} %" for place in range(10))]
    return (
        "## Forgetting curve\n\nShare of the original's tokens that come back, by their place in the text, after "
        f"alignment.\n\n{table(header, rows)}\n\n![Forgetting curve](forgetting.png)"
    )


def _kinds_section(run: FinishedRun, output: Path) -> str:
    groups = by(run.restored(), lambda record: (record["task"], record["kind"]))
    if not groups:
        return ""
    drawn = plots.plot_kinds(run, output / "kinds.png")
    rows = [[task, kind, *_row(_OF_A_KIND, records)] for (task, kind), records in groups.items()]
    shown = table(["task", "kind", *_OF_A_KIND], rows)
    picture = "\n\n![Kinds of text that do not come back whole](kinds.png)" if drawn else ""
    return f"## Kinds of text ({run.label})\n\n{shown}{picture}"


def _questions_section(runs: Sequence[FinishedRun]) -> str:
    rows = []
    for run in runs:
        for (task, kind), records in by(run.answered(), lambda record: (record["task"], record["kind"])).items():
            rows.append([task, kind, run.label, *_row(_ANSWERED, records)])
    return f"## Questions\n\n{table(['task', 'kind', 'run', *_ANSWERED], sorted(rows))}" if rows else ""


def _receipts_section(run: FinishedRun, output: Path, number: int) -> str:
    worst = worst_items(run.records, number)
    if not worst:
        return ""
    page = receipts_page(f"Receipts: {run.label}", worst, len(run.restored()))
    _write(output / "receipts.html", page)
    rows = [
        [record["task"], record["id"], f"{record['metrics']['char_precision']:.3f}", str(record["num_tokens"])]
        for record in worst
    ]
    return (
        f"## Receipts ({run.label})\n\nThe worst items, with every difference: [receipts.html](receipts.html).\n\n"
        f"{table(['task', 'item', 'char_precision', 'tokens'], rows)}"
    )


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
