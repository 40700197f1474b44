"""What it takes before the first token: importing the package, and loading a model from a file."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from .record import ROOT
from .shapes import Setup


IMPORT = """
import json, time
start = time.process_time()
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
middle = time.process_time()
import c3_hf
end = time.process_time()
auto_classes, both = middle - start, end - start
print(json.dumps({"auto_classes_s": auto_classes, "c3_hf_s": both, "ratio": both / auto_classes}))
"""
LOAD = """
import json, sys, time
from benchmarks.record import process_memory
from c3_hf import C3Config, C3ForConditionalGeneration
from benchmarks.shapes import make_config

# What loading imports is not what the weights take.
toy = C3ForConditionalGeneration(make_config("toy"))
toy.save_pretrained(sys.argv[2])
C3ForConditionalGeneration.from_pretrained(sys.argv[2])
before = process_memory("VmRSS")
start = time.perf_counter()
model = C3ForConditionalGeneration.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
# Weights are mapped from the file: memory is taken when they are first read.
for parameter in model.parameters():
    parameter.sum()
read = time.perf_counter()
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
peak = process_memory("VmHWM") - before
print(json.dumps({"weights_bytes": weights, "load_s": loaded - start, "load_and_read_s": read - start,
                  "peak_bytes": peak, "peak_over_weights": peak / weights}))
"""


def run(setup: Setup) -> list[dict[str, Any]]:
    """Rows `import` and `load`, each from fresh processes; `load` in the model's dtype."""
    imports = [_fresh_process(IMPORT) for _ in range(setup.scale.repeats)]
    rows = [{"what": "import", **{name: statistics.median(row[name] for row in imports) for name in imports[0]}}]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as toy:
        setup.model.save_pretrained(folder)
        loads = [_fresh_process(LOAD, folder, toy) for _ in range(setup.scale.repeats)]
    rows.append({"what": "load", **{name: statistics.median(row[name] for row in loads) for name in loads[0]}})
    return rows


def _fresh_process(code: str, *arguments: str) -> dict[str, float]:
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(process.stdout.splitlines()[-1])
