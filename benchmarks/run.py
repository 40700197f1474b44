"""Measure and write records: `python -m benchmarks.run --suite cpu`, or `--suite gpu` on a machine with a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from c3_hf.evaluation.provenance import clean_commit

from . import (
    against_full_text,
    against_hardware,
    against_original,
    drafting,
    floors,
    restoring,
    scaling,
    shapes,
    start_up,
)
from .record import Record, environment


RESULTS = Path(__file__).parent / "results" / "speed"
BENCHMARKS = {
    "against_original": against_original,
    "against_full_text": against_full_text,
    "against_hardware": against_hardware,
    "restoring": restoring,
    "drafting": drafting,
    "scaling": scaling,
    "start_up": start_up,
}
# These ask the model for the text back, so they need its processor and, to mean anything, trained weights.
NEED_PROCESSOR = ("restoring", "drafting")
# The original knows no stride: on the same weights it would compute something else.
NEED_NO_STRIDE = ("against_original",)
SUITES = {
    "cpu": {"shapes": ("tiny", "medium"), "dtype": torch.float32},
    "gpu": {"shapes": ("released",), "dtype": torch.bfloat16},
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; auto takes a GPU for the suite gpu")
    parser.add_argument("--shape", choices=shapes.SCALES, action="append", help="instead of the suite's models")
    parser.add_argument("--benchmark", choices=BENCHMARKS, action="append", help="only these; default: all")
    parser.add_argument("--threads", type=int, help="threads on a CPU; default: torch's")
    parser.add_argument("--allow-changes", action="store_true", help="record from a checkout with changes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    return parser.parse_args(arguments)


def choose_device(name: str, suite: str) -> torch.device:
    """The device to measure on."""
    if name == "auto":
        name = "cuda" if suite == "gpu" and torch.cuda.is_available() else "cpu"
    if name == "cpu" and suite == "gpu":
        print(
            "no GPU: the suite runs on the CPU, which is only good for trying it out on --shape toy", file=sys.stderr
        )
    return torch.device(name)


def run_one(name: str, shape: str, setup: shapes.Setup, command: str, commit: str | None) -> Record:
    """Run one benchmark and wrap up what it measured."""
    start = time.perf_counter()
    machine = environment(setup.device)
    measurements = BENCHMARKS[name].run(setup)
    return Record(
        benchmark=name,
        command=command,
        environment=machine,
        model=shapes.describe(shape, setup.model),
        settings={
            "seed": shapes.SEED,
            "attention": setup.model.config._attn_implementation,
            **dataclasses.asdict(setup.scale),
        },
        floors=setup.rates,
        measurements=measurements,
        seconds=time.perf_counter() - start,
        commit=commit,
    )


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    commit = clean_commit(options.allow_changes)
    suite = SUITES[options.suite]
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device, options.suite)
    rates = floors.measure_rates(device, suite["dtype"])
    # Where the records go is a folder of this machine and no part of what was measured.
    kept = [word for before, word in zip(["", *arguments], arguments) if "--output" not in (before, word)]
    command = " ".join(["python -m benchmarks.run", *kept])
    for shape in options.shape or suite["shapes"]:
        model, processor = shapes.load(shape, device, suite["dtype"])
        setup = shapes.Setup(model, processor, shapes.SCALES[shape], rates)
        for name in options.benchmark or BENCHMARKS:
            if name in NEED_PROCESSOR and processor is None:
                continue
            if name in NEED_NO_STRIDE and model.config.latent_stride is not None:
                continue
            path = run_one(name, shape, setup, command, commit).write(options.output)
            print(f"{time.strftime('%H:%M:%S')} {path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
