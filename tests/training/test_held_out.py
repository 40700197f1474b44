from __future__ import annotations

import gzip
import json

import pytest
import torch

import factories
from c3_hf.data.collator import C3DataCollator
from c3_hf.data.records import parse_files
from c3_hf.training.measures import (
    HeldOutFile,
    free_running,
    read_held_out,
    token_accuracy,
)


@pytest.fixture(scope="module")
def processor():
    return factories.make_processor()


@pytest.fixture(scope="module")
def model():
    return factories.make_model()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.jsonl.gz"
    records = [("long", "a" * 30), ("long", "b" * 7), ("long", "c" * 30), ("other", "d" * 30)]
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"kind": kind, "text": text}) + "\n" for kind, text in records)
    return path


def test_texts_are_cut_to_the_ratio(file, processor):
    texts = read_held_out([HeldOutFile(file, "long")], processor, [1, 2], num_items=5)
    assert [(text.source, text.ratio, text.text) for text in texts] == [
        *(("long", 1, char * 4) for char in "abc"),
        *(("long", 2, char * 8) for char in "ac"),
    ]
    assert len(read_held_out([HeldOutFile(file, None)], processor, [2], num_items=2)) == 2


def test_names_of_results(file):
    entries = ["texts.jsonl.gz", {"path": "texts.jsonl.gz", "kind": "long"}]
    whole, part = (HeldOutFile(*found) for found in parse_files("eval_files", entries, str(file.parent), "kind"))
    assert (whole.name, part.name) == ("texts", "long")
    with pytest.raises(ValueError, match=r"`eval_files` entries are existing files or \{path, kind\}"):
        list(parse_files("eval_files", [{"path": "texts.jsonl.gz", "sort": "long"}], str(file.parent), "kind"))


def test_token_accuracy_counts_the_likeliest_tokens(model, processor):
    texts = ["one text", "another, longer text", "x"]
    collator = C3DataCollator(processor)
    accuracy = token_accuracy(model, collator, texts, batch_size=2)
    right = total = 0
    for text in texts:
        ids = processor.apply_chat_template(processor.restore_messages(text))
        answer = torch.tensor([[*processor.tokenize_context(text), 258]])
        prompt = ids["input_ids"]
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer], 1), context_input_ids=ids["context_input_ids"]).logits
        right += int((logits[:, prompt.shape[1] - 1 : -1].argmax(-1) == answer).sum())
        total += answer.shape[1]
    assert accuracy == right / total


def test_precision_of_a_model_that_knows_nothing(model, processor):
    precision, whole = free_running(model, processor, ["some text", "more"])
    assert 0 <= precision < 0.5
    assert whole == 0
