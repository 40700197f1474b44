"""Two processes on one CPU, and a process that is killed. Slow: every run is a new Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from c3_hf import C3ForConditionalGeneration
from c3_hf.training.trainer import complete_checkpoints


pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
# Sums in another order, in float32, over a few steps.
LOSS_TOLERANCE = 2e-4


def environment():
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def single(recipe_path, *overrides):
    command = [sys.executable, "-m", "c3_hf.training.train", recipe_path, *overrides]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=900)


def launch(config, recipe_path, *overrides):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "c3_hf.training.train", recipe_path, *overrides]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def losses(folder):
    entries = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.fixture(params=["ddp", "fsdp2"])
def config(request, tmp_path):
    """The configuration a user takes, for two processes on one CPU."""
    path = tmp_path / f"{request.param}.yaml"
    text = (REPOSITORY / "examples" / "recipes" / "accelerate" / path.name).read_text()
    text = text.replace("num_processes: 8", "num_processes: 2").replace(
        "mixed_precision: bf16", 'mixed_precision: "no"'
    )
    path.write_text(text + "use_cpu: true\n")
    return path


def test_two_processes_train_as_one(config, write_recipe, recipe, tmp_path):
    path = write_recipe({**recipe, "max_steps": 6, "save_steps": 4, "text_kinds": {"plain": 1, "digits": 1}})
    single(path, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "4")
    two = tmp_path / "two"
    launch(config, path, "--output_dir", str(two), "--per_device_train_batch_size", "2")
    one_losses, two_losses = losses(tmp_path / "one"), losses(two)
    assert two_losses == pytest.approx(one_losses, rel=LOSS_TOLERANCE)
    model = C3ForConditionalGeneration.from_pretrained(two)
    assert model.config.num_latents == 4

    for folder in complete_checkpoints(two)[1:]:
        folder.rename(two / f"gone-{folder.name}")
    assert [folder.name for folder in complete_checkpoints(two)] == ["checkpoint-4"]
    (two / "log.jsonl").unlink()
    launch(config, path, "--output_dir", str(two), "--per_device_train_batch_size", "2")
    resumed = losses(two)
    assert sorted(resumed) == [5, 6]
    assert resumed == pytest.approx({step: two_losses[step] for step in (5, 6)}, rel=LOSS_TOLERANCE)


def test_two_processes_read_out_and_look_up_as_one(config, write_recipe, recipe, tmp_path):
    recipe |= {"num_latents": 16, "latent_stride": 4, "attn_implementation": "eager", "readout_weight": 1.0}
    recipe |= {"tasks": {"pieces": 1.0}, "min_context_tokens": 48, "context_ceiling": [[0, 64]]}
    recipe |= {"lookup_weight": 1.0, "lookup_heads": {1: [0, 1, 2, 3]}, "max_steps": 1, "save_strategy": "no"}
    accuracies = []
    for name, size in (("one", "4"), ("two", "2")):
        # The losses are means over a micro-batch, so what two processes share out is near what one sees, no more.
        path = write_recipe({**recipe, "output_dir": str(tmp_path / name)}, f"{name}.yaml")
        size = ("--per_device_train_batch_size", size)
        if name == "one":
            single(path, *size)
        else:
            launch(config, path, *size)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        (entry,) = (entry for entry in map(json.loads, lines) if "loss" in entry)
        accuracies.append([entry[key] for key in ("loss", "readout_accuracy", "lookup_accuracy")])
    assert accuracies[0] == pytest.approx(accuracies[1], rel=0.05)


def test_killed_at_any_moment_a_run_goes_on(write_recipe, recipe, tmp_path):
    path = write_recipe({**recipe, "max_steps": 40, "save_steps": 2, "save_total_limit": 2})
    single(path, "--output_dir", str(tmp_path / "whole"))
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "c3_hf.training.train", path, "--output_dir", str(output)]
    for kill_after in (1, 4):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        start = len(complete_checkpoints(output))
        deadline = time.monotonic() + 600
        first = complete_checkpoints(output)[-1:]
        while process.poll() is None and time.monotonic() < deadline:
            done = complete_checkpoints(output)
            steps = int(done[-1].name[11:]) if done else 0
            base = int(first[0].name[11:]) if first else 0
            if steps >= base + 2 * kill_after:
                break
            time.sleep(0.01)
        assert process.poll() is None, f"finished before it could be killed; {start} checkpoints at the start"
        process.send_signal(signal.SIGKILL)
        process.wait()
    single(path, "--output_dir", str(output))
    first, second = (C3ForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters()):
        assert one.equal(other), name
