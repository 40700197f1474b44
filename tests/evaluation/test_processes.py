"""Several processes share a run and leave the numbers of one."""

import json
import os
import subprocess
import sys

import pytest

from c3_hf.evaluation.records import FinishedRun


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(repository, tiny_checkpoint, data_dir, tmp_path):
    words = ["-m", "c3_hf.cli", "evaluate", "--model", str(tiny_checkpoint), "--data-dir", str(data_dir)]
    words += ["--tasks", "short_passages", "multidoc_qa", "--batch-size", "2", "--max-new-tokens", "4"]
    words += ["--answer-tokens", "3", "--segment-tokens", "48", "--device", "cpu", "--allow-changes"]
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
    }
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name, launcher in launchers.items():
        command = [*launcher, *words, "--output", str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    assert len((tmp_path / "two" / "items.rank1.jsonl").read_text().splitlines()) > 0
    outputs = [
        {
            (record["task"], record["id"]): (record["output"], record["metrics"])
            for record in FinishedRun.read(folder).records
        }
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert outputs[0] == outputs[1]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text())["metrics"] for name in launchers]
    assert summaries[0] == summaries[1]
