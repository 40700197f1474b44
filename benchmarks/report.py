"""Run every measurement of the published report on the bundled model and write it: `python -m benchmarks.report`.

All runs come from one clean commit and one set of weights. A run that was stopped goes on; runs of another commit or
of other weights are in the way and have to be removed first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c3_hf import tiny_model_path
from c3_hf.evaluation.report import write_report
from c3_hf.evaluation.run import RunSettings, run


RESULTS = Path(__file__).parent / "results" / "evaluation"
# Texts that may be measured but not passed on.
HASH_ONLY = r"NiuTrans|Wikipedia|OI-wiki|_page_ocr\.json|lost-in-the-middle|long-zh"
KINDS = ("code", "edge_cases", "fox_pages", "json_logs", "passages")
KINDS += ("random_strings", "short_passages", "shuffled", "tables")
LONG = ("ratio_sweep", "long_restoring")
QUESTIONS = ("kv_retrieval", "multidoc_qa", "needles_multi", "needles_single", "needles_two_hop")
# What each run measures. Texts are cut into segments, but for the run that shows what one block does.
RUNS: dict[str, dict[str, Any]] = {
    "c3": {"tasks": KINDS, "limit": 40, "cut": True},
    "c3-long": {"tasks": LONG, "limit": 5, "cut": True},
    "truncation": {"system": "truncation", "tasks": KINDS, "limit": 40, "cut": True},
    "truncation-long": {"system": "truncation", "tasks": LONG, "limit": 5, "cut": True},
    "mean-pool": {"system": "mean_pool", "tasks": ("passages", "short_passages"), "limit": 16, "cut": True},
    "c3-one-block": {"tasks": ("passages",), "limit": 16},
    "c3-questions": {"tasks": QUESTIONS},
    "full-text": {"system": "full_text", "tasks": ("short_passages", *QUESTIONS), "limit": 16},
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the tasks' data files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--allow-changes", action="store_true", help="record from a checkout with changes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the runs and the report")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="only these, without a report")
    options = parser.parse_args(arguments)
    for label in options.runs:
        settings = RunSettings(
            model=tiny_model_path(),
            batch_size=options.batch_size,
            device=options.device,
            hash_only=HASH_ONLY,
            **RUNS[label],
        )
        run(settings, options.data_dir, options.output / label, options.allow_changes)
    if len(options.runs) < len(RUNS):
        return 0
    print(write_report([options.output / label for label in RUNS], options.output / "report"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
