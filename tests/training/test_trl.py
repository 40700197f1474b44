"""TRL's SFTTrainer: chats with contexts train the encoder through C3DataCollator, and do not train without it."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import factories
from c3_hf.data.collator import C3DataCollator


MESSAGES = [
    [
        {
            "role": "user",
            "content": [{"type": "context", "text": text}, {"type": "text", "text": "Repeat the text: "}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    for text in ("It was the best of times.", "It was the worst of times.")
]
MISSING = r"`context_input_ids` are missing from a training batch: row 0 .* block of 4 context placeholders"
SETTINGS = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "remove_unused_columns": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def records():
    return [{"messages": messages} for messages in MESSAGES]


def tokenized_as_trl_does(processor):
    """What SFTTrainer makes of chats before it trains: the processor is asked, and only `input_ids` are kept."""
    for messages in MESSAGES:
        result = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            chat_template=None,
            tools=None,
            return_assistant_tokens_mask=False,
        )
        yield result["input_ids"][0].tolist()


def collated_as_trl_does(rows):
    length = max(map(len, rows))
    pad = [[0] * (length - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor([row + more for row, more in zip(rows, pad)]),
        "attention_mask": torch.tensor([[1] * len(row) + more for row, more in zip(rows, pad)]),
        "labels": torch.tensor([row + [-100] * len(more) for row, more in zip(rows, pad)]),
    }


@pytest.fixture
def model():
    return factories.make_model()


def trained_parts(model, before):
    names = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    return {part for part in ("encoder", "latent_queries", "projector", "language_model") if part in "\n".join(names)}


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_placeholders_without_contexts_do_not_train(model):
    batch = collated_as_trl_does(list(tokenized_as_trl_does(factories.make_processor())))
    with pytest.raises(ValueError, match=MISSING):
        model(**batch)
    # A trainer may keep the labels for itself, and only ask for logits.
    del batch["labels"]
    with pytest.raises(ValueError, match=MISSING):
        model.train()(**batch)
    assert model.eval()(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_contexts_in_line_do_not_train(model):
    """What becomes of chats where the tokenizer stands for the processor."""
    tokenizer = factories.make_processor().tokenizer
    ids = tokenizer.apply_chat_template(MESSAGES[0], tokenize=True, return_dict=True)["input_ids"]
    # The body alone: SFTTrainer puts a forward() of its own in the place of the whole model's.
    with pytest.raises(ValueError, match="`input_ids` holds contexts in line, but only"):
        model.model.train()(input_ids=torch.tensor([ids]))


def test_chats_without_a_context_train_as_they_are(model):
    model.train()
    ids = torch.tensor([[257, 12, 13, 14, 263, 15]])
    model(input_ids=ids, labels=ids).loss.backward()


def test_the_collator_trains_every_part(model, tmp_path):
    before = copies(model)
    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    Trainer(model, args, train_dataset=records(), data_collator=C3DataCollator(factories.make_processor())).train()
    assert trained_parts(model, before) == {"encoder", "latent_queries", "projector", "language_model"}


@pytest.fixture
def sft(tmp_path):
    """A function that trains with TRL."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets comes with the extra `train`")

    def train(model, **options):
        settings = {**SETTINGS, **options.pop("settings", {})}
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **settings),
            train_dataset=datasets.Dataset.from_list(records()),
            **{"processing_class": factories.make_processor(), **options},
        )
        trainer.train()

    return train


# TRL's own warnings are not ours to mend.
@pytest.mark.filterwarnings("default")
def test_trl_refuses_what_it_would_drop(model, sft):
    with pytest.raises(ValueError, match=MISSING):
        sft(model)
    with pytest.raises(ValueError, match="`input_ids` holds contexts in line"):
        sft(model, processing_class=factories.make_processor().tokenizer)


@pytest.mark.filterwarnings("default")
def test_trl_trains_every_part_through_the_collator(model, sft):
    before = copies(model)
    sft(
        model,
        settings={"dataset_kwargs": {"skip_prepare_dataset": True}},
        data_collator=C3DataCollator(factories.make_processor()),
    )
    assert trained_parts(model, before) == {"encoder", "latent_queries", "projector", "language_model"}
