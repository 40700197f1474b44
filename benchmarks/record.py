"""Timing and records: a number that is published lies in a JSON record that says how it came about."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from c3_hf.evaluation import provenance
from c3_hf.files import write_json


SCHEMA = 2
ROOT = provenance.ROOT


def synchronize(device: torch.device) -> None:
    """Wait for the device: work on an accelerator is asynchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    candidates: dict[str, Callable[[], Any]], device: torch.device, *, warmup: int = 1, repeats: int = 5
) -> dict[str, list[float]]:
    """Time each candidate `repeats` times, in turns, so that a change of the machine's load falls on all of them.

    Returns:
        Name to seconds of each round.
    """
    # Graphs compiled for other sizes would count toward torch's limit, past which it stops compiling.
    torch.compiler.reset()
    for _ in range(warmup):
        for function in candidates.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, smallest and largest value and their number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def ratio(numerator: Sequence[float], denominator: Sequence[float], factor: float = 1.0) -> dict[str, float | int]:
    """Spread of `factor` × numerator / denominator, round by round."""
    return spread([factor * a / b for a, b in zip(numerator, denominator)])


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which memory grows at most while `function` runs: of the device, or of the process on a CPU (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    # What was freed but is kept for later would hide what the function needs.
    ctypes.CDLL(None).malloc_trim(0)
    # Sets the process's high-water mark back to what it holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("VmRSS")
    function()
    return process_memory("VmHWM") - before


def process_memory(key: str, process: int | str = "self") -> int:
    """Bytes of a line of /proc/PROCESS/status, such as VmRSS (held now) or VmHWM (held at most)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        device_name, device_memory = properties.name, properties.total_memory
    else:
        device_name, device_memory = _processor_name(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        **provenance.environment(),
        "device": device.type,
        "device_name": device_name,
        "device_memory_bytes": device_memory,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Above the number of cores, something else ran beside the benchmark.
        "load_average_1min": os.getloadavg()[0],
    }


def _processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


@dataclasses.dataclass
class Record:
    """One benchmark on one model.

    Attributes:
        benchmark: name of the module that measured.
        command: how to run it again.
        model: name, weights (`random` or a fingerprint), parameters, dtype and configuration.
        settings: sizes, repeats and the seed.
        floors: measured rates of the machine: `matmul_flops_per_s`, `copy_bytes_per_s` (read plus written).
        measurements: a list of rows; times in seconds, each with median, min, max and repeats.
        seconds: how long it took.
        commit: what `provenance.clean_commit` said before it began.
    """

    benchmark: str
    command: str
    environment: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    floors: dict[str, float]
    measurements: list[dict[str, Any]]
    seconds: float
    commit: str | None
    date: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )
    schema: int = SCHEMA

    def write(self, folder: Path) -> Path:
        """Write `BENCHMARK.MODEL.DEVICE.json`; an older record of that name is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.{self.model['name']}.{self.environment['device']}.json"
        write_json(path, dataclasses.asdict(self))
        return path
