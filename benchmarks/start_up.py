"""What it takes before the first token: importing the package, loading a model, converting a checkpoint."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c3_hf.conversion.export import export

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
CONVERT = """
import json, sys, time
from benchmarks.record import process_memory
from c3_hf.conversion.convert_c3_to_hf import convert

source, output, weights = sys.argv[1:]
before = process_memory("VmRSS")
start = time.perf_counter()
convert(source, output)
seconds = time.perf_counter() - start
peak = process_memory("VmHWM") - before
print(json.dumps({"weights_bytes": int(weights), "convert_s": seconds, "peak_bytes": peak,
                  "peak_over_weights": peak / int(weights)}))
"""


def run(setup: Setup) -> list[dict[str, Any]]:
    """Rows `import`, `load` and `convert`, each from fresh processes, the latter two in the model's dtype.

    Only models of the released layout, two Qwen2 halves, are converted.
    """
    repeats, weights = setup.scale.repeats, sum(parameter.nbytes for parameter in setup.model.parameters())
    rows = [_medians("import", [_fresh_process(IMPORT) for _ in range(repeats)])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup.model.save_pretrained(folder / "model")
        loads = [_fresh_process(LOAD, folder / "model", folder / "toy") for _ in range(repeats)]
        rows.append(_medians("load", loads))
        if setup.model.config.text_config.model_type == "qwen2":
            export(folder / "model", folder / "released", "original")
            rows.append(
                {"what": "convert", **_fresh_process(CONVERT, folder / "released", folder / "output", weights)}
            )
    return rows


def _medians(what: str, results: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {"what": what, **{name: statistics.median(row[name] for row in results) for name in results[0]}}


def _fresh_process(code: str, *arguments: Path | int) -> dict[str, float]:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(process.stdout.splitlines()[-1])
