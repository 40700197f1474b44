"""Tables, plots and receipts of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from c3_hf.evaluation import plots
from c3_hf.evaluation.plots import FIGURE_1, FIGURE_1_BINS
from c3_hf.evaluation.receipts import receipts_page, worst_items
from c3_hf.evaluation.records import FinishedRun
from c3_hf.evaluation.summary import by, count, mean, mean_of, ratio, values, with_interval
from c3_hf.files import atomic_file


_ANSWER_METRICS = ("contains_answer", "best_subspan_match", "answer_f1")
# Official pages if they were run, else the look-alikes.
_ENGLISH_PAGES = ("fox_en", "foxlike_en")
_MAX_CURVES = 7


def write_report(folders: Sequence[Path], output: Path, receipts: int = 10) -> Path:
    """Write `report.md`, its pictures and `receipts.html`.

    Args:
        folders: Output folders of finished runs; kinds and receipts are shown for the first one that ran.
        output: Folder of the report.
        receipts: Number of worst items shown.

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


def _ratios(records: list[dict]) -> list[str]:
    return [f"{ratio(records):.1f}×", f"{ratio(records, 'num_characters'):.1f}"]


def _runs_section(runs: Sequence[FinishedRun]) -> str:
    header = [
        "run",
        "system",
        "checkpoint",
        "weights",
        "commit",
        "items",
        "seconds",
        "text in",
        "contexts in",
        "texts a task",
    ]
    rows = []
    for run in runs:
        settings = run.config["settings"]
        rows.append(
            [
                run.label,
                settings["system"] + (f", skipped: {run.skipped}" if run.skipped else ""),
                settings["model"],
                f"`{run.config['weights'][:12]}`" if run.config["weights"] else "hub",
                f"`{run.config['commit'][:12]}`" if run.config["commit"] else "unknown",
                str(len(run.records)),
                f"{sum(record['seconds'] for record in run.records):.0f}",
                f"blocks of {run.config['segment_tokens']} tokens" if settings["cut"] else "one block",
                f"blocks of {run.config['segment_tokens']} tokens",
                str(settings["limit"] or "all"),
            ]
        )
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
        f"{mixed}{table(header, rows)}\n\nFirst run's environment: {versions}. METEOR: {runs[0].config['meteor']}."
    )


def _tasks_section(runs: Sequence[FinishedRun]) -> str:
    header = [
        "task",
        "run",
        "items",
        "ratio",
        "characters a slot",
        "char_precision",
        "fox_precision",
        "exact",
        "CER",
        "token acc.",
        "ROUGE-L",
        "BLEU",
        "length",
        "first error",
    ]
    metrics = ("exact_match", "character_error_rate", "token_accuracy", "rouge_l", "bleu", "length_ratio")
    rows = []
    for task in dict.fromkeys(record["task"] for run in runs for record in run.restored()):
        for run in runs:
            records = run.of(task)
            if records:
                rows.append(
                    [
                        task,
                        run.label,
                        count(records),
                        *_ratios(records),
                        with_interval(records, "char_precision"),
                        with_interval(records, "fox_precision"),
                        *(f"{mean(values(records, metric)):.3f}" for metric in metrics),
                        f"{mean(values(records, 'first_error_position')):.3f}",
                    ]
                )
    return f"## Restoring\n\n{table(header, rows)}" if rows else ""


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
    header = ["task", "kind", "items", "ratio", "characters a slot", "char_precision", "fox_precision", "exact"]
    rows = [
        [
            task,
            kind,
            count(records),
            *_ratios(records),
            with_interval(records, "char_precision"),
            f"{mean(values(records, 'fox_precision')):.3f}",
            f"{mean(values(records, 'exact_match')):.2f}",
        ]
        for (task, kind), records in groups.items()
    ]
    picture = "\n\n![Kinds of text that do not come back whole](kinds.png)" if drawn else ""
    return f"## Kinds of text ({run.label})\n\n{table(header, rows)}{picture}"


def _questions_section(runs: Sequence[FinishedRun]) -> str:
    rows = []
    for run in runs:
        for (task, kind), records in by(run.answered(), lambda record: (record["task"], record["kind"])).items():
            scores = [with_interval(records, metric, 2) for metric in _ANSWER_METRICS]
            rows.append([task, kind, run.label, count(records), *_ratios(records), *scores])
    header = ["task", "kind", "run", "items", "ratio", "characters a slot", *_ANSWER_METRICS]
    return f"## Questions\n\n{table(header, sorted(rows))}" if rows else ""


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
