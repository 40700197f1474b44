"""The converted golden checkpoints compute what the original computed, loaded through auto classes and remote code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor


GOLDEN_SETS = ("tiny_a", "vocab_b")
# One of each kind that loading could spoil; tests/modeling runs every case on the package's classes.
CASES = ("mid_context", "empty_context", "batch_right_padded_contexts_left_padded_prompts")

FRESH_PROCESS = """
import json, sys
sys.modules["c3_hf"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
folder, arguments = sys.argv[1], json.loads(sys.argv[2])
ids = torch.tensor(arguments["input_ids"])
context = torch.tensor(arguments["context_input_ids"])
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
assert type(model) is type(other) and not type(model).__module__.startswith("c3_hf"), type(model).__module__
generated = model.generate(ids, context_input_ids=context, max_new_tokens=arguments["max_new_tokens"])
print(json.dumps(generated[:, ids.shape[1]:].tolist()))
"""


class Golden:
    """One golden set with its converted model."""

    def __init__(self, name: str, shared_dir: Path, folder: Path):
        source = shared_dir / "goldens" / name
        self.facts = json.loads((source / "cases.json").read_text(encoding="utf-8"))
        self.tensors = load_file(source / "tensors.safetensors")
        self.folder = folder
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        self.tolerance = self.facts["tolerance"]["suggested_atol"]

    def contexts(self, case: dict) -> dict[str, torch.Tensor]:
        """The original's context rows (text, block, anything) as text and mask, without markers."""
        start = self.facts["special_ids"]["img"]
        masks = case.get("context_attention_mask") or [[1] * len(row) for row in case["context_ids"]]
        rows, kept = [], []
        for row, mask in zip(case["context_ids"], masks, strict=True):
            length = row.index(start)
            rows.append(row[:length])
            kept.append(mask[:length])
        width = max(map(len, rows))
        pad = self.facts["special_ids"]["eot_and_pad"]
        return {
            "context_input_ids": torch.tensor(
                [row + [pad] * (width - len(row)) for row in rows], dtype=torch.long
            ).reshape(len(rows), width),
            "context_attention_mask": torch.tensor(
                [mask + [0] * (width - len(mask)) for mask in kept], dtype=torch.long
            ).reshape(len(rows), width),
        }


@pytest.fixture(scope="module", params=GOLDEN_SETS)
def golden(request, shared_dir, converted_goldens) -> Golden:
    return Golden(request.param, shared_dir, converted_goldens[request.param])


@pytest.mark.parametrize("name", CASES)
def test_remote_code_computes_what_the_original_did(golden, name):
    case = next(case for case in golden.facts["cases"] if case["name"] == name)
    inputs = {"input_ids": torch.tensor(case["input_ids"]), **golden.contexts(case)}
    if "attention_mask" in case:
        inputs["attention_mask"] = torch.tensor(case["attention_mask"])
    compare_forward(golden, case, inputs)
    compare_generation(golden, case, inputs)


def compare_forward(golden: Golden, case: dict, inputs: dict) -> None:
    recorded = {name: golden.tensors[key] for name, key in case["tensors"].items()}
    contexts = {name: value for name, value in inputs.items() if name.startswith("context")}
    with torch.inference_mode():
        encoder_latents = golden.model.get_encoder_latents(**contexts)
        output = golden.model(**inputs)
    close = {"rtol": 0, "msg": lambda text: f"{case['name']}: {text}"}
    atol = golden.tolerance["latents"]
    torch.testing.assert_close(encoder_latents.flatten(1, 2), recorded["encoder_latents"], atol=atol, **close)
    torch.testing.assert_close(output.context_latents.flatten(1, 2), recorded["latents"], atol=atol, **close)
    logits = output.logits
    atol = golden.tolerance["logits"]
    if "logits" in recorded:
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(logits[real], recorded["logits"][real], atol=atol, **close)
    if "last_logits" in recorded:
        torch.testing.assert_close(logits[:, -1], recorded["last_logits"], atol=atol, **close)
    if "logits_columns" in recorded:
        columns = logits[..., torch.tensor(golden.facts["logits_columns"])]
        if case.get("logits_columns_positions") == "last only":
            columns = columns[:, -1:]
        torch.testing.assert_close(columns, recorded["logits_columns"], atol=atol, **close)
    assert logits[:, -1].argmax(-1).flatten().tolist() == torch.tensor(case["last_argmax"]).flatten().tolist()


def compare_generation(golden: Golden, case: dict, inputs: dict) -> None:
    if "generate" not in case:
        return
    expected = case.get("fixed_new_ids", case["generate"]["new_ids"])
    generated = golden.model.generate(**inputs, **case["generate"]["kwargs"])
    new_ids = generated[:, inputs["input_ids"].shape[1] :].tolist()
    assert new_ids == expected, case["name"]


@pytest.mark.slow
def test_text_cases_through_the_processor(shared_dir, converted_goldens):
    golden = Golden("vocab_b", shared_dir, converted_goldens["vocab_b"])
    processor = AutoProcessor.from_pretrained(golden.folder, trust_remote_code=True)
    compared = 0
    for case in golden.facts["cases"]:
        if case["kind"] != "text" or case["name"].startswith("special_tokens"):
            continue
        content = [{"type": "context", "text": case["context_text"]}, {"type": "text", "text": case["prompt_text"]}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}])
        assert inputs["input_ids"].tolist() == case["input_ids"], case["name"]
        generated = golden.model.generate(**inputs, **case["generate"]["kwargs"])
        new_ids = generated[:, inputs["input_ids"].shape[1] :]
        # The original's reply keeps special tokens other than the stop.
        reply = processor.batch_decode(new_ids, skip_special_tokens=False)[0]
        expected = case.get("fixed_chat_reply", case["chat_reply"]).removesuffix("<|endoftext|>")
        assert reply.strip() == expected.strip(), case["name"]
        compared += 1
    assert compared >= 6


# Quicker, and of a random model: tests/modeling/test_remote_code.py.
@pytest.mark.slow
def test_fresh_process_without_the_package(shared_dir, converted_goldens, tmp_path):
    golden = Golden("tiny_a", shared_dir, converted_goldens["tiny_a"])
    case = next(case for case in golden.facts["cases"] if case["name"] == "mid_context")
    limit = len(case["generate"]["new_ids"][0])
    arguments = {
        "input_ids": case["input_ids"],
        "context_input_ids": golden.contexts(case)["context_input_ids"].tolist(),
        "max_new_tokens": limit,
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(golden.folder), json.dumps(arguments)],
        env={**environment, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == case["generate"]["new_ids"]
