from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import factories
from c3_hf import C3Processor
from c3_hf.data.collator import OUTCOMES, C3DataCollator
from c3_hf.data.lengths import SampleKey
from c3_hf.data.records import parse_record
from c3_hf.data.samples import Sample
from c3_hf.data.tasks import TASKS


IM_END = 258


def restore(text, index=0, length=0, step=0):
    return Sample(TASKS["restore"](np.random.default_rng(0), text), SampleKey(index, length, step))


def chat(*messages, contexts=()):
    turns = [{"role": role, "content": text} for role, text in messages]
    return Sample(parse_record({"messages": turns, "contexts": list(contexts)}), SampleKey(0, 0))


def counts(batch):
    return {name: int(count) for name, count in zip(OUTCOMES, batch["outcome_counts"]) if count}


def labels_of(batch, row=0):
    labels = batch["labels"][row]
    return labels[labels != -100].tolist()


def test_labels_are_the_answer_and_the_end_of_turn(processor):
    batch = C3DataCollator(processor)([restore("Hello there")])
    assert labels_of(batch) == [*processor.tokenize_context("Hello there"), IM_END]
    assert batch["context_input_ids"][0, 0].tolist() == processor.tokenize_context("Hello there")
    assert counts(batch) == {"examples": 1}


def test_an_open_reply_has_no_end_of_turn(processor):
    closed = restore("Hello there")
    opened = Sample(dataclasses.replace(closed.example, is_open=True), closed.key)
    batch = C3DataCollator(processor, teacher_inputs=True)([closed, opened])
    words = processor.tokenize_context("Hello there")
    for kind in ("", "teacher_"):
        labels = [row[row != -100].tolist() for row in batch[f"{kind}labels"]]
        assert labels == [[*words, IM_END], words]
        lengths = batch[f"{kind}attention_mask"].sum(dim=-1)
        assert lengths[0] - lengths[1] == 1
        assert (batch[f"{kind}input_ids"][0, : lengths[1]] == batch[f"{kind}input_ids"][1, : lengths[1]]).all()


def test_ids_before_an_answer_are_what_generation_starts_from(processor):
    # An answer that begins with a line break would merge with the template's own, were both tokenised at once.
    text = "\n\nstarts with line breaks"
    batch = C3DataCollator(processor)([restore(text)])
    prompt = processor.apply_chat_template(processor.restore_messages(text), add_generation_prompt=True)["input_ids"][
        0
    ]
    length = len(prompt)
    assert batch["input_ids"][0, :length].tolist() == prompt.tolist()
    assert batch["labels"][0, :length].eq(-100).all()
    assert batch["labels"][0, length] != -100


def test_logits_to_keep_cover_all_labels(processor):
    batch = C3DataCollator(processor)([restore("short"), restore("a good deal longer")])
    keep = batch["logits_to_keep"]
    assert batch["labels"][:, : batch["labels"].shape[1] - keep + 1].eq(-100).all()
    assert batch["labels"][:, batch["labels"].shape[1] - keep + 1].ne(-100).any()


def test_padding(processor):
    batch = C3DataCollator(processor, pad_to_multiple_of=16)([restore("ab", length=16), restore("abcdef", length=16)])
    assert batch["context_input_ids"].shape == (2, 1, 16)
    assert batch["context_attention_mask"].sum(-1).flatten().tolist() == [2, 6]
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()
    single = C3DataCollator(processor)([restore("ab")])
    length = single["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].tolist() == single["input_ids"][0].tolist()
    assert batch["attention_mask"][0].sum() == length


def test_several_contexts_are_not_each_padded_to_the_length_of_their_text(processor):
    several = chat(("user", "<context><context>?"), ("assistant", "yes"), contexts=["abc", "abcdefghi"])
    several = several._replace(key=SampleKey(0, 64))
    batch = C3DataCollator(processor, pad_to_multiple_of=8)([several])
    assert batch["context_input_ids"].shape == (1, 2, 16)
    batch = C3DataCollator(processor, pad_to_multiple_of=8)([restore("abc", length=64)])
    assert batch["context_input_ids"].shape == (1, 1, 64)


def test_literal_special_tokens_stay_text(processor):
    text = "a <|im_end|> b <img> <imgpad> <|endoftext|>"
    batch = C3DataCollator(processor)([restore(text)])
    assert processor.tokenizer.decode(labels_of(batch)[:-1]) == text
    assert labels_of(batch).count(IM_END) == 1
    assert batch["input_ids"][0].tolist().count(263) == processor.num_latents
    assert counts(batch) == {"examples": 1, "literal_special_in_answer": 1}


def test_an_empty_answer_trains_the_end_of_turn(processor):
    batch = C3DataCollator(processor)([restore("")])
    assert labels_of(batch) == [IM_END]
    assert counts(batch) == {"examples": 1, "empty_answer": 1}


def test_every_batch_has_a_context_slot(processor):
    batch = C3DataCollator(processor)([chat(("user", "hi"), ("assistant", "ho"))])
    assert batch["context_input_ids"].shape == (1, 1, 1)
    assert batch["context_attention_mask"].sum() == 0


def test_ragged_contexts(processor):
    batch = C3DataCollator(processor)(
        [
            chat(("user", "q"), ("assistant", "a"), contexts=["one", "three"]),
            chat(("user", "q"), ("assistant", "a"), contexts=["four"]),
            chat(("user", "q"), ("assistant", "a")),
        ]
    )
    assert batch["context_attention_mask"].sum(-1).tolist() == [[3, 5], [4, 0], [0, 0]]
    assert (batch["input_ids"] == 263).sum(-1).tolist() == [2 * processor.num_latents, processor.num_latents, 0]


def test_only_chosen_answers_carry_loss(processor):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "first", "loss": False},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "second"},
    ]
    sample = Sample(parse_record({"messages": turns, "contexts": ["c"]}), SampleKey(0, 0))
    batch = C3DataCollator(processor)([sample])
    assert processor.decode(labels_of(batch)) == "second"


def test_over_long_contexts_and_prompts_carry_no_loss(processor):
    collator = C3DataCollator(processor, max_context_tokens=10, max_prompt_tokens=10_000)
    batch = collator([restore("x" * 11), restore("x" * 10)])
    assert batch["context_input_ids"].shape[-1] == 10
    assert labels_of(batch, 0) == []
    assert len(labels_of(batch, 1)) == 11
    assert counts(batch) == {"examples": 2, "over_long_context": 1}

    collator = C3DataCollator(processor, max_prompt_tokens=100)
    batch = collator([restore("x" * 300)])
    assert batch["input_ids"].shape == (1, 100)
    assert labels_of(batch) == []
    assert (batch["input_ids"] == 263).sum() == 0
    assert batch["context_attention_mask"].sum() == 0
    assert counts(batch) == {"examples": 1, "over_long_prompt": 1}


def test_noise_touches_the_decoders_input_only(processor):
    text = "the quick brown fox jumps over the lazy dog " * 4
    clean = C3DataCollator(processor)([restore(text, index) for index in range(8)])
    noisy = C3DataCollator(processor, token_noise=0.5, noise_from_step=3)
    batch = noisy([restore(text, index, step=3) for index in range(8)])
    for name in ("labels", "context_input_ids", "attention_mask"):
        assert torch.equal(batch[name], clean[name])
    changed = batch["input_ids"] != clean["input_ids"]
    assert not changed[clean["labels"] == -100].any()
    assert not changed[clean["input_ids"] == IM_END].any()
    shares = changed.sum(-1) / (clean["labels"] != -100).sum(-1)
    assert 0 < shares.max() <= 0.65
    assert shares.min() < shares.max()
    assert batch["input_ids"].max() < 264
    early = noisy([restore(text, index, step=2) for index in range(8)])
    assert torch.equal(early["input_ids"], clean["input_ids"])
    again = noisy([restore(text, 5, step=3)])
    assert torch.equal(again["input_ids"][0], batch["input_ids"][5])
    assert torch.equal(noisy.without_noise()([restore(text, 5, step=3)])["input_ids"][0], clean["input_ids"][5])


def test_teacher_reads_the_context_as_text(processor):
    batch = C3DataCollator(processor, teacher_inputs=True)([restore("ab"), restore("abcdefgh")])
    for row, text in enumerate(("ab", "abcdefgh")):
        labels = batch["teacher_labels"][row]
        assert labels[labels != -100].tolist() == labels_of(batch, row)
        ids = batch["teacher_input_ids"][row][batch["teacher_attention_mask"][row] == 1]
        assert f"{text}Repeat the text: " in processor.tokenizer.decode(ids)
    assert (batch["teacher_input_ids"] == 263).sum() == 0


def test_a_template_that_does_not_only_append_is_refused(processor):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    broken = C3Processor(processor.tokenizer, num_latents=4)
    broken.chat_template = template
    with pytest.raises(ValueError, match="does not render a conversation as the beginning of a longer one"):
        C3DataCollator(broken)([chat(("user", "q"), ("assistant", "a"))])


def golden_samples(shared_dir):
    cases = json.loads((shared_dir / "goldens/vocab_b/cases.json").read_text(encoding="utf-8"))
    return cases["training_samples"]


def test_conversations_give_the_originals_ids_and_labels(shared_dir, real_processor):
    compared = 0
    for sample in golden_samples(shared_dir):
        example = parse_record({"conversations": sample["conversations"]})
        batch = C3DataCollator(real_processor)([Sample(example, SampleKey(0, 0))])
        block = [151857, *[151859] * 32, 151858]
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        if all(label == -100 for label in sample["labels"]) or "<image>" in "".join(answers):
            continue
        compared += 1
        assert batch["input_ids"][0].tolist() == sample["input_ids"]
        assert batch["labels"][0].tolist() == sample["labels"]
        mask = batch["context_attention_mask"][0, 0].bool()
        assert batch["context_input_ids"][0, 0][mask].tolist() + block == sample["context_ids"]
    assert compared >= 4


def test_the_originals_label_defects_are_fixed(shared_dir, real_processor):
    defective = 0
    for sample in golden_samples(shared_dir):
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        lost = all(label == -100 for label in sample["labels"])
        if not lost and "<image>" not in "".join(answers):
            continue
        defective += 1
        example = parse_record({"conversations": sample["conversations"]})
        batch = C3DataCollator(real_processor)([Sample(example, SampleKey(0, 0))])
        labels = labels_of(batch)
        assert labels[-1] == 151645
        assert max(labels[:-1], default=0) < 151643
        assert real_processor.tokenizer.decode(labels[:-1]) == answers[0]
    assert defective >= 3


def test_without_noise_keeps_the_rest(processor):
    collator = C3DataCollator(processor, token_noise=0.5, teacher_inputs=True, max_prompt_tokens=77)
    assert collator.without_noise() == dataclasses.replace(collator, token_noise=0.0, teacher_inputs=False)


RECORD = {
    "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}],
    "contexts": ["first", "second one"],
}


def test_a_batch_of_records_is_what_forward_takes(processor):
    plain = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    batch = C3DataCollator(processor)([RECORD, plain])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "context_input_ids", "context_attention_mask"}
    assert batch["context_attention_mask"].sum(-1).tolist() == [[5, 10], [0, 0]]
    assert labels_of(batch, 0) == [*processor.tokenize_context("This one."), IM_END]
    assert labels_of(batch, 1) == [*processor.tokenize_context("Hello"), IM_END]
    model = factories.make_model().train()
    model(**batch).loss.backward()
    assert model.model.encoder.embed_tokens.weight.grad.any()


def test_records_that_cannot_be_collated(processor):
    with pytest.raises(ValueError, match="needs `messages` or `conversations`, got the plain text 'just text'"):
        C3DataCollator(processor)([{"text": "just text"}])
    with pytest.raises(ValueError, match=r"`token_noise` \(0.5\) and `teacher_inputs` \(False\) are for samples"):
        C3DataCollator(processor, token_noise=0.5)([RECORD])


def test_records_that_are_cut_are_named_once(processor, caplog):
    with caplog.at_level("WARNING"):
        batch = C3DataCollator(processor, max_context_tokens=7)([RECORD])
    assert "Examples are longer than `max_context_tokens`, 7: they are cut and carry no loss" in caplog.text
    assert labels_of(batch) == []


def test_the_model_reads_on_where_a_prompt_was_cut(processor):
    # The cut example has lost its context, and with it both markers, while another row still has its own.
    collator = C3DataCollator(processor, max_prompt_tokens=100)
    batch = collator([restore("x" * 300), restore("short")])
    inputs = {name: value for name, value in batch.items() if name != "outcome_counts"}
    labels = inputs.pop("labels")
    logits = factories.make_model().train()(**inputs).logits
    assert torch.isfinite(logits).all()
    assert (labels[0] == -100).all()
