from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from c3_hf.data.lengths import LengthGroupedBatches, LengthSchedule, SampleKey
from c3_hf.data.records import RecordSource, StreamingSource, TrainingFile, parse_record, parse_training_files
from c3_hf.data.samples import ExampleMaker, MixtureDataset, StreamingMixtureDataset, cut_to_tokens
from c3_hf.data.tasks import CONTINUE_PROMPT, FIND_PROMPT
from c3_hf.modeling.prompt_c3 import RESTORE_PROMPT


SCHEDULE = LengthSchedule(8, [(0, 64)])


def context_of(sample):
    return sample.example.messages[0]["content"][0]["text"]


def prompt_of(sample):
    return sample.example.messages[0]["content"][-1]["text"]


@pytest.mark.parametrize("num_tokens", range(1, 24))
def test_cuts_fall_between_characters(processor, num_tokens):
    text = "ab话说é🙂天下大势"
    cut = cut_to_tokens(processor.tokenizer, text, num_tokens)
    assert text.startswith(cut)
    assert len(cut.encode()) <= num_tokens
    longer = text[: len(cut) + 1]
    assert cut == text or len(longer.encode()) > num_tokens


@pytest.fixture(scope="module")
def dataset(processor, text_files):
    maker = ExampleMaker(
        processor.tokenizer,
        SCHEDULE,
        {"restore": 0.6, "continue": 0.1, "answer": 0.2, "answer_segments": 0.1},
        {"plain": 0.5, "shuffled_words": 0.25, "digits": 0.25},
    )
    return MixtureDataset(RecordSource(text_files), maker)


def test_a_sample_is_a_function_of_its_number(dataset, processor, text_files):
    keys = [SampleKey(index, 48) for index in range(20)]
    first = [dataset[key] for key in keys]
    assert [dataset[key] for key in reversed(keys)] == first[::-1]
    assert len({context_of(sample) for sample in first}) > 15
    again = MixtureDataset(RecordSource(text_files), dataset._maker)
    assert [again[key] for key in keys] == first


def test_samples_have_the_length_asked_for(dataset, processor):
    for index in range(40):
        sample = dataset[SampleKey(index, 48)]
        length = len(processor.tokenize_context(context_of(sample)))
        if prompt_of(sample) == RESTORE_PROMPT:
            # One Chinese character is three of the byte tokenizer's tokens.
            assert 48 - 16 - 2 <= length <= 48
        assert length <= 48 + 3 * 60


def test_mixture_shares(dataset):
    prompts = Counter(prompt_of(dataset[SampleKey(index, 16)]) for index in range(400))
    assert abs(prompts[RESTORE_PROMPT] / 400 - 0.6) < 0.1
    assert abs(prompts[CONTINUE_PROMPT] / 400 - 0.1) < 0.06
    assert abs(prompts[FIND_PROMPT] / 400 - 0.3) < 0.1
    chinese = sum(
        "一" <= char <= "龥" for index in range(200) for char in context_of(dataset[SampleKey(index, 16)])[:1]
    )
    assert 5 < chinese < 80


def test_a_step_that_asks_makes_samples_that_ask(processor, text_files):
    schedule = LengthSchedule(8, [(0, 64)], num_latents=4, asking_share=0.5, asking_stride_ceiling=[(0, 4)])
    tasks = {"restore": 0.6, "continue": 0.1, "pieces": 0.2, "answer": 0.1, "answer_segments": 0.0}
    dataset = MixtureDataset(
        RecordSource(text_files), ExampleMaker(processor.tokenizer, schedule, tasks, {"plain": 1.0})
    )

    def prompts(asks: bool | None) -> Counter:
        return Counter(prompt_of(dataset[SampleKey(index, 48, asks=asks)]) for index in range(100))

    assert set(prompts(True)) == {FIND_PROMPT}
    others = prompts(False)
    assert set(others) == {RESTORE_PROMPT, CONTINUE_PROMPT}
    assert 4 < others[CONTINUE_PROMPT] < 30
    assert set(prompts(None)) == {FIND_PROMPT, RESTORE_PROMPT, CONTINUE_PROMPT}
    for some in ({"restore": 1.0, "find": 0.0}, {"find": 1.0}):
        with pytest.raises(ValueError, match=r"`tasks` must have some of both, got {.*find.*}. Add one, or leave"):
            ExampleMaker(processor.tokenizer, schedule, some, {"plain": 1.0})


def test_given_messages_pass_through(tmp_path, processor):
    path = tmp_path / "chats.jsonl"
    record = {"contexts": ["c"], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    maker = ExampleMaker(processor.tokenizer, SCHEDULE, {"restore": 1}, {"plain": 1})
    sample = MixtureDataset(RecordSource([TrainingFile(str(path))]), maker)[SampleKey(3, 16)]
    assert sample.example == parse_record(record)
    assert context_of(sample) == "c"


def test_streaming_reads_every_file_again_and_again(processor, text_files):
    batches = LengthGroupedBatches(SCHEDULE, num_steps=10, micro_batches_per_step=1, batch_size=4)
    maker = ExampleMaker(processor.tokenizer, SCHEDULE, {"restore": 1}, {"plain": 1})

    def read():
        return list(StreamingMixtureDataset(StreamingSource(text_files, seed=0), maker, batches))

    first = read()
    assert len(first) == 40
    assert [sample.key for sample in first] == [key for batch in batches for key in batch]
    assert read() == first
    assert sum("话" in context_of(sample) or "分" in context_of(sample) for sample in first) > 2
    assert list(islice(StreamingMixtureDataset(StreamingSource(text_files, seed=1), maker, batches), 40)) != first


def test_unknown_names_are_refused(processor):
    with pytest.raises(ValueError, match=r"`tasks` knows .*'restore'.* got \['recite'\]"):
        ExampleMaker(processor.tokenizer, SCHEDULE, {"recite": 1}, {"plain": 1})
    with pytest.raises(ValueError, match=r"`text_kinds` needs weights .* positive sum"):
        ExampleMaker(processor.tokenizer, SCHEDULE, {"restore": 1}, {"plain": 0})


def test_training_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    parsed = parse_training_files(["a.jsonl", {"path": "a.jsonl", "weight": 2}], str(tmp_path))
    assert [file.weight for file in parsed] == [1.0, 2.0]
    with pytest.raises(ValueError, match="`train_files` is empty"):
        parse_training_files([], None)
    with pytest.raises(ValueError, match="positive weight"):
        parse_training_files([{"path": "a.jsonl", "weight": 0}], str(tmp_path))
    with pytest.raises(ValueError, match="which is no file"):
        parse_training_files(["b.jsonl"], str(tmp_path))


def test_texts_are_drawn_by_length(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * 99}) + "\n", encoding="utf-8")
    source, rng = RecordSource([TrainingFile(str(path))]), np.random.default_rng(0)
    assert sum(source.draw(rng) == "a" for _ in range(300)) < 15
