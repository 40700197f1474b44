"""Run a C3 checkpoint under EleutherAI's lm-evaluation-harness: plain prompts, no context.

C3 trains its decoder to restore; this shows what it still can as a language model. The harness's stock Hugging Face
backend is enough: a C3 checkpoint is a causal language model to it. `--tasks` names tasks of the harness, most of
which download data; by default two tiny tasks run on the sentences below, offline.

    pip install lm-eval
    python examples/lm_eval_plain_prompts.py --model MODEL --tasks lambada_openai hellaswag
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM

import c3_hf


# The right ending comes first.
ENDINGS = [
    ("The train left the station, and the people on the", ["platform waved.", "moonlight seven."]),
    ("She opened the window because the room was too", ["warm.", "Tuesday."]),
    ("He put the letter back into the", ["envelope.", "because."]),
    ("In the morning the fields were white with", ["frost.", "quickly."]),
]


def offline_tasks(folder: Path) -> list[dict]:
    """Two tasks of the harness over `ENDINGS`: choose the ending, and write one."""
    rows = [{"prompt": prompt, "choices": choices, "answer": 0} for prompt, choices in ENDINGS]
    data = folder / "endings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data)},
        "test_split": "train",
        "doc_to_text": "{{prompt}}",
    }
    choose = {
        "task": "choose_the_ending",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    write = {
        "task": "write_the_ending",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return [{**common, **choose}, {**common, **write}]


def evaluate(model: str, tasks: list | None = None, device: str = "cpu", batch_size: int = 4) -> dict:
    """Scores by task, as the harness reports them."""
    backend = HFLM(pretrained=model, backend="causal", device=device, dtype="float32", batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        results = lm_eval.simple_evaluate(
            model=backend, tasks=tasks or offline_tasks(Path(folder)), bootstrap_iters=0, log_samples=False
        )
    return results["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=c3_hf.tiny_model_path(), help="C3 checkpoint (default: c3-tiny)")
    parser.add_argument("--tasks", nargs="+", help="tasks of the harness (default: two offline ones)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for task, scores in evaluate(arguments.model, arguments.tasks, arguments.device).items():
        print(task, {name: round(float(value), 4) for name, value in scores.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
