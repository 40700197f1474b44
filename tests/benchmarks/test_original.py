"""The restated original against what the original's own code recorded, and against the product."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.original import OriginalC3, original_context_ids

from c3_hf import C3ForConditionalGeneration
from factories import make_model


@pytest.fixture(scope="module")
def golden(shared_dir: Path, converted_goldens: dict[str, Path]) -> tuple[OriginalC3, list[dict]]:
    """The golden set with ids only, converted, and its cases in which one text is generated greedily."""
    model = C3ForConditionalGeneration.from_pretrained(converted_goldens["tiny_a"], dtype=torch.float32)
    cases = json.loads((shared_dir / "goldens" / "tiny_a" / "cases.json").read_text(encoding="utf-8"))["cases"]
    wanted = [case for case in cases if "generate" in case and case["kind"] == "single"]
    return OriginalC3(model).eval(), [case for case in wanted if case["generate"]["kwargs"]["num_beams"] == 1]


def generate(original: OriginalC3, case: dict, **changes) -> list[int]:
    input_ids = torch.tensor(case["input_ids"])
    output = original.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        context_ids=torch.tensor(case["context_ids"]),
        pad_token_id=500,
        **{**case["generate"]["kwargs"], "eos_token_id": [500, 502], **changes},
    )
    return output[0, input_ids.shape[1] :].tolist()


@pytest.mark.slow
def test_it_generates_what_the_original_generated(golden):
    original, cases = golden
    assert len(cases) > 10
    # Where the original's stop test misbehaves, the fixed value holds: stopping is not what is measured.
    expected = {case["name"]: case.get("fixed_new_ids", case["generate"]["new_ids"])[0] for case in cases}
    assert {case["name"]: generate(original, case) for case in cases} == expected


def test_it_embeds_the_context_at_every_step_and_runs_the_encoder_once(golden):
    original, cases = golden
    case = next(case for case in cases if case["name"] == "long_context")
    embedded, encoded = [], []
    handles = [
        original.encoder.get_input_embeddings().register_forward_hook(lambda *_: embedded.append(1)),
        original.encoder.register_forward_hook(lambda *_: encoded.append(1)),
    ]
    new_ids = generate(original, case)
    for handle in handles:
        handle.remove()
    assert len(embedded) == len(new_ids)
    assert len(encoded) == 1


def test_the_product_generates_the_same():
    model = make_model()
    config = model.config
    original = OriginalC3(model).eval()
    contexts = torch.randint(250, (1, 20), generator=torch.Generator().manual_seed(0))
    block = [config.context_start_token_id, *[config.context_token_id] * config.num_latents]
    input_ids = torch.tensor([[5, *block, config.context_end_token_id, 7, 8]])
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 12, "min_new_tokens": 12}
    context_ids = original_context_ids(config, contexts)
    assert torch.equal(
        original.generate(input_ids=input_ids, context_ids=context_ids, **options),
        model.generate(input_ids=input_ids, context_input_ids=contexts, **options),
    )
