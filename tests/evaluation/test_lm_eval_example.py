"""A C3 checkpoint runs under lm-evaluation-harness through its stock Hugging Face backend."""

import warnings

import pytest
import torch

from c3_hf import C3ForConditionalGeneration, C3Processor


@pytest.fixture
def example(load_example):
    """The example as a module."""
    return load_example("lm_eval_plain_prompts.py", "lm_eval")


def log_probability(model, processor, prompt, ending):
    """Sum of log-probabilities of the ending's tokens behind the prompt."""
    prompt_ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = processor.tokenizer(f"{prompt} {ending}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
    places = range(len(prompt_ids), len(ids))
    return sum(scores[place - 1, ids[place]].item() for place in places)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_harness_scores_are_those_of_the_model(example, tiny_checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = example.evaluate(str(tiny_checkpoint))
    model = C3ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    processor = C3Processor.from_pretrained(tiny_checkpoint)
    right = [
        log_probability(model, processor, prompt, choices[0]) > log_probability(model, processor, prompt, choices[1])
        for prompt, choices in example.ENDINGS
    ]
    assert scores["choose_the_ending"]["acc,none"] == sum(right) / len(right)
    assert 0.0 <= scores["write_the_ending"]["exact_match,none"] <= 1.0
