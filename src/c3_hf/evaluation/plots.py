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
_GREY = "#8a8a8a"


def plot_figure_1(runs: Sequence[FinishedRun], pages: str, path: Path) -> None:
    """Precision by page length: the published curves in grey, the runs' `fox_precision` on `pages` in colour."""
    figure, axes = _figure(8.6, 4.6)
    for number, (label, percents) in enumerate(FIGURE_1.items()):
        style = ("-", "--", ":", "-.", (0, (1, 3)))[number]
        axes.plot(FIGURE_1_BINS, percents, color=_GREY, linestyle=style, linewidth=1.4, label=f"published: {label}")
    for number, run in enumerate(runs):
        groups = {label: run.of("fox_pages", bin=label, kind=pages) for label in FIGURE_1_BINS}
        _line(
            axes,
            number,
            f"{run.label} ({ratio(run.of('fox_pages', kind=pages)):.1f}\u00d7)" if any(groups.values()) else run.label,
            [FIGURE_1_BINS.index(label) for label, rows in groups.items() if rows],
            [[100 * value for value in values(rows, "fox_precision")] for rows in groups.values() if rows],
        )
    axes.tick_params(axis="x", labelsize=8)
    axes.set(xlabel="tokens of the page", ylabel="precision in percent", ylim=(-3, 103))
    axes.set_title(f"Pages by length: runs on {pages} (fox_precision, 95 % intervals)", fontsize=10)
    _finish(figure, axes, path)


def plot_ratio(runs: Sequence[FinishedRun], path: Path) -> None:
    """`char_precision` of the ratio sweep against the compression ratio."""
    figure, axes = _figure(7.4, 4.2)
    ticks: set[int] = set()
    for number, run in enumerate(runs):
        groups = by(run.of("ratio_sweep"), lambda record: int(record["bin"].removesuffix("x")))
        order = sorted(groups)
        ticks.update(order)
        _line(axes, number, run.label, order, [values(groups[label], "char_precision") for label in order])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{tick}\u00d7" for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.set(xlabel="tokens for each latent", ylabel="char_precision", ylim=(-0.03, 1.03))
    axes.set_title("The same text at every ratio (95 % intervals over texts)", fontsize=10)
    _finish(figure, axes, path)


def plot_forgetting(runs: Sequence[FinishedRun], tasks: Sequence[str], path: Path) -> None:
    """Accuracy by relative position: one panel a run, one line a task."""
    from matplotlib.figure import Figure

    columns = min(3, len(runs))
    height = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(max(5.2, 3.6 * columns), 0.8 + 3.4 * height), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(height, columns, sharey=True, squeeze=False).flat)
    for unused in panels[len(runs) :]:
        unused.set_visible(False)
    for axes, run in zip(panels, runs):
        for number, task in enumerate(tasks):
            rows = run.of(task)
            if rows:
                curve = mean_of([{"curve": record["metrics"]["accuracy_by_position"]} for record in rows])["curve"]
                centres = [100 * (place + 0.5) / len(curve) for place in range(len(curve))]
                _mark(axes, number, task, centres, [float("nan") if value is None else value for value in curve])
        axes.set(xlabel="place in the text, percent", ylim=(-0.03, 1.03), xlim=(0, 100))
        axes.set_title(run.label, fontsize=10)
        axes.grid(axis="y", color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of tokens kept")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    _save(figure, path)


def plot_kinds(run: FinishedRun, path: Path) -> None:
    """`char_precision` of every kind of text, best first."""
    groups = by(run.restored(), lambda record: f"{record['task']} / {record['kind']}")
    order = sorted(groups, key=lambda name: mean(values(groups[name], "char_precision")))
    figure, axes = _figure(7.4, 1.0 + 0.21 * len(order))
    for place, name in enumerate(order):
        numbers = values(groups[name], "char_precision")
        low, high = bootstrap_interval(numbers)
        axes.barh(place, mean(numbers), color=_COLOURS[0], height=0.7)
        axes.plot((low, high), (place, place), color="#222222", linewidth=1.2)
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.set(xlabel="char_precision", xlim=(0, 1.0), ylim=(-0.6, len(order) - 0.4))
    axes.set_title(f"{run.label}: kinds of text (95 % intervals)", fontsize=10)
    axes.grid(axis="x", color="#e4e4e4")
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Axes, number: int, label: str, places: Sequence[float], samples: Sequence[Sequence[float]]) -> None:
    """Means of `samples` with a band of 95 % bootstrap intervals."""
    if not samples:
        return
    intervals = [bootstrap_interval(sample) for sample in samples]
    _mark(axes, number, label, places, [mean(sample) for sample in samples])
    colour = _COLOURS[number % len(_COLOURS)]
    low, high = ([interval[end] for interval in intervals] for end in (0, 1))
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _mark(axes: Axes, number: int, label: str, places: Sequence[float], heights: Sequence[float]) -> None:
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    axes.plot(places, heights, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # No software entry, so that equal runs give equal files.
    figure.savefig(path, metadata={"Software": None})
