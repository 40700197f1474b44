"""The report's pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from c3_hf.evaluation.records import FinishedRun, bootstrap_interval, by, mean, mean_of, ratio, values


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# arXiv 2511.15244, Fig. 1: Fox English pages, "precision" in percent (the authors do not define the word), by page
# tokens. The DeepSeek-OCR columns are those the figure quotes. Bins hold 4 to 28 pages.
FIGURE_1_BINS = ("600-700", "700-800", "800-900", "900-1000", "1000-1100", "1100-1200", "1200-1300")
FIGURE_1 = {
    "C3, 32 latents": (99.7, 99.7, 98.8, 98.7, 98.8, 94.0, 93.3),
    "C3, 64 latents": (99.7, 99.9, 99.7, 99.9, 99.7, 98.6, 98.4),
    "C3, 100 latents": (99.9, 99.5, 99.7, 99.7, 99.5, 98.5, 97.5),
    "DeepSeek-OCR, 64 tokens": (96.5, 93.8, 83.8, 85.8, 79.3, 76.3, 59.1),
    "DeepSeek-OCR, 100 tokens": (98.5, 97.3, 96.8, 96.8, 91.5, 89.8, 87.1),
}

# Okabe and Ito's colours, told apart by colour-blind readers; yellow is left out, it is too light for lines.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
# A picture of fewer bars says less than the table beside it.
_FEWEST_KINDS = 3


def plot_figure_1(runs: Sequence[FinishedRun], pages: str, path: Path) -> None:
    """Precision by page length: the published curves in a panel of their own, beside the runs' `fox_precision`.

    They are two measurements, of other pages and other models, so that no axis lays one over the other.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.4, 4.4), dpi=150, layout="constrained")
    published, own = figure.subplots(1, 2, sharey=True)
    for number, (label, percents) in enumerate(FIGURE_1.items()):
        places = [place + beside(number, len(FIGURE_1)) / 2 for place in range(len(percents))]
        _mark(published, number, label, places, percents, joined=True)
    published.set_title("Published: the official Fox pages", fontsize=10)
    measured = [run for run in runs if run.of("fox_pages", kind=pages)]
    for number, run in enumerate(measured):
        groups = {label: run.of("fox_pages", bin=label, kind=pages) for label in FIGURE_1_BINS}
        _points(
            own,
            number,
            len(measured),
            f"{run.label} ({ratio(run.of('fox_pages', kind=pages)):.1f}\u00d7)",
            [FIGURE_1_BINS.index(label) for label, rows in groups.items() if rows],
            [[100 * value for value in values(rows, "fox_precision")] for rows in groups.values() if rows],
        )
    own.set_title(f"Measured here: {pages}, other pages and models (95 % intervals)", fontsize=10)
    for axes in (published, own):
        _dress(axes)
        axes.set_xticks(range(len(FIGURE_1_BINS)), FIGURE_1_BINS, fontsize=8, rotation=30, ha="right")
        axes.set(xlabel="tokens of the page", ylim=(-3, 103), xlim=(-0.5, len(FIGURE_1_BINS) - 0.5))
        axes.legend(frameon=False, fontsize=8, loc="center left")
    published.set_ylabel("precision in percent")
    _save(figure, path)


def plot_ratio(runs: Sequence[FinishedRun], path: Path) -> None:
    """`char_precision` of the ratio sweep at each ratio; nothing joins two of them, for nobody measured in between."""
    figure, axes = _figure(7.4, 4.2)
    groups = [by(run.of("ratio_sweep"), lambda record: int(record["bin"].removesuffix("x"))) for run in runs]
    ticks = sorted(set().union(*groups))
    for number, (run, found) in enumerate(zip(runs, groups)):
        order = sorted(found)
        samples = [values(found[label], "char_precision") for label in order]
        _points(axes, number, len(runs), run.label, [ticks.index(tick) for tick in order], samples)
    axes.set_xticks(range(len(ticks)), [f"{tick}\u00d7" for tick in ticks])
    axes.set(xlabel="tokens for each latent", ylabel="char_precision", ylim=(-0.03, 1.03))
    axes.set_title("The same text at every ratio (95 % intervals over texts)", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def plot_forgetting(runs: Sequence[FinishedRun], tasks: Sequence[str], path: Path) -> None:
    """Accuracy by relative position: one panel a run, one row a task, one cell a tenth of the text."""
    from matplotlib.figure import Figure

    curves = [(run, [task for task in tasks if run.of(task)]) for run in runs]
    heights = [0.9 + 0.26 * len(found) for _, found in curves]
    figure = Figure(figsize=(7.4, sum(heights)), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights).flat)
    for axes, (run, found) in zip(panels, curves):
        rows = [[{"curve": record["metrics"]["accuracy_by_position"]} for record in run.of(task)] for task in found]
        draw_tenths(axes, found, [mean_of(row)["curve"] for row in rows])
        axes.set_title(run.label, fontsize=10, loc="left")
    panels[-1].set_xlabel("place in the text, percent; in the cells the percent of tokens kept", fontsize=8)
    _save(figure, path)


def draw_tenths(axes: Axes, names: Sequence[str], curves: Sequence[Sequence[float | None]]) -> None:
    """Shares, 0 to 1, by tenths of a text: a row for each name, a cell for each tenth with its percent in it."""
    filled = [[float("nan") if value is None else value for value in curve] for curve in curves]
    width = len(filled[0])
    axes.imshow(filled, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, curve in enumerate(filled):
        for place, value in enumerate(curve):
            shown = "" if math.isnan(value) else _percent(value)
            axes.text(
                place, row, shown, ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black"
            )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(
        [place - 0.5 for place in range(width + 1)], [f"{100 * place // width}" for place in range(width + 1)]
    )
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _percent(share: float) -> str:
    """Whole percents; what is not all or nothing never shows as 100 or 0."""
    if share in (0, 1):
        return f"{100 * share:.0f}"
    return "<1" if share < 0.01 else f"{min(math.floor(100 * share), 99)}"


def plot_kinds(run: FinishedRun, path: Path) -> bool:
    """`char_precision` of the kinds of text that do not come back whole, best first.

    Returns:
        Whether there is a picture: of fewer than `_FEWEST_KINDS` such kinds the table says as much.
    """
    groups = by(run.restored(), lambda record: f"{record['task']} / {record['kind']}")
    means = {name: mean(values(rows, "char_precision")) for name, rows in groups.items()}
    order = sorted((name for name in means if means[name] < 1), key=means.__getitem__)
    if len(order) < _FEWEST_KINDS:
        return False
    figure, axes = _figure(7.4, 1.0 + 0.21 * len(order))
    for place, name in enumerate(order):
        low, high = bootstrap_interval(values(groups[name], "char_precision"))
        axes.barh(place, means[name], color=_COLOURS[0], height=0.7)
        axes.plot((low, high), (place, place), color="#222222", linewidth=1.2)
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.set(xlabel="char_precision", xlim=(0, 1.0), ylim=(-0.6, len(order) - 0.4))
    whole = len(groups) - len(order)
    title = f"{run.label}: kinds of text (95 % intervals)" + (f"; {whole} more are whole" if whole else "")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="#e4e4e4")
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    _save(figure, path)
    return True


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    axes.grid(axis="y", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)


def _points(
    axes: Axes, number: int, total: int, label: str, places: Sequence[float], samples: Sequence[Sequence[float]]
) -> None:
    """Means of `samples` with 95 % bootstrap intervals; each of `total` series stands a little beside the others."""
    shifted = [place + beside(number, total) for place in places]
    intervals = [bootstrap_interval(sample) for sample in samples]
    _mark(axes, number, label, shifted, [mean(sample) for sample in samples])
    axes.vlines(shifted, *zip(*intervals), color=_COLOURS[number % len(_COLOURS)], linewidth=1.4, alpha=0.6)


def beside(number: int, total: int) -> float:
    """How far series `number` of `total` is moved from its place, so that equal values do not cover each other."""
    return (number - (total - 1) / 2) * min(0.16, 0.7 / total)


def _mark(
    axes: Axes, number: int, label: str, places: Sequence[float], heights: Sequence[float], joined: bool = False
) -> None:
    """Marks of one series; `joined` by a line only where the places follow each other without a gap."""
    axes.plot(
        places,
        heights,
        color=_COLOURS[number % len(_COLOURS)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=5,
        linewidth=1.2 if joined else 0,
        label=label,
    )


def _save(figure: Figure, path: Path) -> None:
    # No software entry, so that equal runs give equal files.
    figure.savefig(path, metadata={"Software": None})
