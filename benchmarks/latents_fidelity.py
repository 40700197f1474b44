"""What teacher-forced fidelity predicts: certain parts, calibrated precision, and what each dtype of latents costs.

`python -m benchmarks.latents_fidelity --data DATA --plot docs/images`: every second text fits the two numbers of the
calibration, the others test them. With `--save` they go into the `processor_config.json` of the model's folder.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from c3_hf import C3Pipeline, compress
from c3_hf.evaluation.metrics.characters import char_precision
from c3_hf.files import write_json
from c3_hf.latents.decoding import batches_by_length
from c3_hf.latents.measure import Calibration, SegmentFidelity, expected_precision
from c3_hf.latents.segments import Segment, iter_segments

from .latents_setup import data_hash, load, parser, restore_blocks, texts, write_record


KINDS = ("passages_en", "passages_zh", "shuffled", "code", "tables")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
# Lengths of the longest segment that the model was made for, and beyond.
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="tokens of a segment")
    options.add_argument("--plot", type=Path, help="folder for calibration.png")
    options.add_argument("--save", action="store_true", help="write the calibration into the model's folder")
    options = options.parse_args(arguments)
    started = time.perf_counter()
    model, processor = load(options)
    options.lengths = options.lengths or [round(share * model.config.longest_segment) for share in SHARES]
    items: list[dict[str, Any]] = []
    used = []
    sources = [(kind, text) for kind in KINDS for text in texts(options, kind)]
    for length in options.lengths:
        found = [next(iter_segments(text, processor.tokenizer, length)) for _, text in sources]
        used += [segment.text for segment in found]
        measured = zip(sources, measure(C3Pipeline(model, processor), found, options.batch_size))
        items += [{"kind": kind, "length": length, **item} for (kind, _), item in measured]
        print(length, statistics.mean(item["precision"] for item in items[-len(found) :]), file=sys.stderr)
    # A text is in one half with all its lengths.
    halves = [[item for place, item in enumerate(items) if place % len(sources) % 2 == half] for half in (0, 1)]
    calibration = fit(halves[0])
    for item in items:
        item["expected"] = expected_precision(item["margins"], calibration)
    rows = [*summarise(items, halves[1], calibration), *dtype_rows(model, processor, options)]
    for item in items:
        del item["margins"]
    write_record("latents_fidelity", options, model, started, [*rows, *items], data_sha256=data_hash(used))
    for row in rows:
        print(row, file=sys.stderr)
    if options.plot is not None:
        plot(halves[1], options.plot)
    if options.save:
        path = Path(options.model) / "processor_config.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**saved, "calibration": {"derail": calibration.derail, "floor": calibration.floor}})
    broken = sum(item["certain_prefix"] > item["agreeing_tokens"] for item in items)
    return 1 if broken else 0


def measure(pipe: C3Pipeline, segments: Sequence[Segment], batch_size: int) -> list[dict[str, Any]]:
    """Margins and free-running result of each segment; float32 latents."""
    results: dict[int, dict[str, Any]] = {}
    for rows in batches_by_length([len(segment.token_ids) for segment in segments], batch_size):
        for row, block in zip(rows, restore_blocks(pipe, [segments[row].token_ids for row in rows])):
            fidelity = SegmentFidelity.from_margins(block.margins)
            wanted = list(block.token_ids)
            agreeing = next(
                (place for place, (a, b) in enumerate(zip(wanted, block.new_ids)) if a != b),
                min(len(wanted), len(block.new_ids)),
            )
            results[row] = {
                "tokens": fidelity.num_tokens,
                "token_accuracy": fidelity.token_accuracy,
                "certain_prefix": fidelity.exact_prefix,
                "agreeing_tokens": agreeing,
                "certainly_exact": fidelity.num_errors == 0,
                "exact": wanted == block.new_ids,
                "precision": char_precision(block.text, segments[row].text),
                "margins": block.margins,
            }
    return [results[row] for row in range(len(segments))]


def fit(items: Sequence[dict[str, Any]]) -> Calibration:
    """The calibration with the least squared error of a segment's expected precision, on a grid.

    Finer where a model hardly ever loses its place, as one whose latents have a stride: there each point counts.
    """
    best, least = Calibration(0.0, 0.0), float("inf")
    for derail in (*range(20), *range(20, 101, 4)):
        for floor in range(0, 101, 4):
            candidate = Calibration(derail / 100, floor / 100)
            errors = [(expected_precision(item["margins"], candidate) - item["precision"]) ** 2 for item in items]
            if sum(errors) < least:
                best, least = candidate, sum(errors)
    return best


def summarise(
    items: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], calibration: Calibration
) -> list[dict[str, Any]]:
    """Promises kept, and expected against seen precision on the held-out half, for each kind and length."""
    rows: list[dict[str, Any]] = [
        {
            "derail": calibration.derail,
            "floor": calibration.floor,
            "segments": len(items),
            "held_out": len(held_out),
            "certainly_exact": sum(item["certainly_exact"] for item in items),
            "of_those_exact": sum(item["certainly_exact"] and item["exact"] for item in items),
            "prefixes_not_kept": sum(item["certain_prefix"] > item["agreeing_tokens"] for item in items),
            **_agreement(held_out),
        }
    ]
    for key in ("kind", "length"):
        values = sorted({item[key] for item in held_out})
        rows += [{key: value, **_agreement([item for item in held_out if item[key] == value])} for value in values]
    return rows


def _agreement(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    expected = statistics.mean(item["expected"] for item in items)
    seen = statistics.mean(item["precision"] for item in items)
    each = statistics.mean(abs(item["expected"] - item["precision"]) for item in items)
    accuracy = statistics.mean(item["token_accuracy"] for item in items)
    return {
        "expected_precision": expected,
        "precision": seen,
        "difference_points": 100 * (expected - seen),
        "mean_absolute_difference_points": 100 * each,
        "token_accuracy": accuracy,
    }


def dtype_rows(model: Any, processor: Any, options: Any) -> list[dict[str, Any]]:
    """Token accuracy and bytes with latents stored in each dtype."""
    source = "\n\n".join(texts(options, "passages_en"))
    rows = []
    for dtype in DTYPES:
        context = compress(source, model, processor, latent_dtype=dtype, verify=True, batch_size=options.batch_size)
        sizes = context.tensors()
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "token_accuracy": context.token_accuracy,
                "latent_bytes": sum(sizes[name].nbytes for name in ("latents", "latent_scales") if name in sizes),
                "tokens": context.num_tokens,
            }
        )
    return rows


def plot(items: Sequence[dict[str, Any]], folder: Path) -> None:
    """Expected against seen precision of the held-out segments: each, and the means of ten bins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
    expected = [100 * item["expected"] for item in items]
    seen = [100 * item["precision"] for item in items]
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=1)
    axes.scatter(expected, seen, s=10, alpha=0.35, color="#4c78a8", label="a held-out segment", edgecolors="none")
    order = sorted(range(len(items)), key=expected.__getitem__)
    bins = [order[start * len(order) // 10 : (start + 1) * len(order) // 10] for start in range(10)]
    means = [
        (statistics.mean(expected[i] for i in part), statistics.mean(seen[i] for i in part)) for part in bins if part
    ]
    axes.plot(*zip(*means), "o", color="#e45756", markersize=6, label="mean of a tenth of them")
    # Marks that cover each other are counted.
    for place, count in Counter((round(x), round(y)) for x, y in means).items():
        if count > 1:
            axes.annotate(f"{count} of the {len(means)} ", place, ha="right", va="top", fontsize=8)
    axes.set(xlabel="expected character precision (%)", ylabel="free-running character precision (%)")
    lowest = 10 * (min(expected + seen) // 10)
    axes.set(xlim=(lowest - 0.5, 100.5), ylim=(lowest - 0.5, 100.5))
    axes.set(title="Fidelity measured by one pass, and what came back")
    axes.legend(loc="upper left", frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "fidelity_calibration.png", dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
