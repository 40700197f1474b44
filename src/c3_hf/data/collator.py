"""Batches from chat messages: contexts and prompts tokenised, padded apart and labelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin
from transformers.utils import logging

from ..modeling.prompt_c3 import CONTEXT_END_TOKEN, CONTEXT_START_TOKEN, CONTEXT_TOKEN
from .lengths import SampleKey
from .records import TrainingExample, parse_record
from .samples import Sample


logger = logging.get_logger(__name__)

# What the collator counts. An over-long example stays in the batch without labels; the others train.
OUTCOMES = ("examples", "over_long_context", "over_long_prompt", "empty_answer", "literal_special_in_answer")
_IGNORE = -100


@dataclass
class C3DataCollator:
    """Collator of chat messages with contexts, for any trainer, and of the samples of `C3Trainer`.

    It takes records as a line of a training file holds them, `{"messages": [...]}` and `{"conversations": [...]}` (see
    `c3_hf.data.records`), so that `transformers.Trainer` and TRL's `SFTTrainer` can train a C3 model:

    ```python
    trainer = Trainer(model, args, train_dataset=records, data_collator=C3DataCollator(processor))
    ```

    Prompts and labels come from the processor's own template. Prompt and reply are tokenised apart, as they are when
    the model generates, so the ids before an answer are exactly those `generate` starts from.

    Args:
        processor: a `C3Processor`.
        max_context_tokens: an example with a longer context carries no loss, and the context is cut; counted.
        max_prompt_tokens: an example with a longer prompt (latent block and answers included) carries no loss, and
            the prompt is cut behind its blocks; counted.
        token_noise: highest share of the decoder's input tokens inside answers that are replaced by random words;
            the share of a sample is drawn evenly from 0 to this. Labels stay clean, so the model learns to find its
            place in the text again after an error of its own.
        noise_from_step: first optimizer step with noise.
        teacher_inputs: also return what the distillation teacher reads.
        pad_to_multiple_of: prompts and contexts are padded to multiples of this: few shapes for compiled code.
        seed: of the noise.
        latent_stride: most tokens a latent stands for, `config.latent_stride`; `None` for a model without a stride.
            Each context has the least stride that covers it, or that of its sample if that is higher.

    A batch holds, as `torch.long` tensors,

    - `input_ids`, `attention_mask`, `labels`: `(batch_size, sequence_length)`, right-padded;
    - `context_input_ids`, `context_attention_mask`: `(batch_size, num_contexts, context_length)`, right-padded; at
      least one column, masked where an example has no context, so that every process of a distributed run uses all
      its parameters;
    - `context_strides`: `(batch_size, num_contexts)`, for a model with a stride;

    and, if it is made of samples, whose contexts, where each has one, are padded to the planned length of the batch,

    - `logits_to_keep`: int, the last positions that hold all labels and the position before the first;
    - `outcome_counts`: `(len(OUTCOMES),)`;
    - `teacher_input_ids`, `teacher_attention_mask`, `teacher_labels` if asked for.

    Raises:
        ValueError: if a record breaks the schema or is plain text, or noise or teacher inputs are asked for records,
            which no trainer but `C3Trainer` uses.
    """

    processor: ProcessorMixin
    max_context_tokens: int = 8192
    max_prompt_tokens: int = 8192
    token_noise: float = 0.0
    noise_from_step: int = 0
    teacher_inputs: bool = False
    pad_to_multiple_of: int = 1
    seed: int = 0
    latent_stride: int | None = None

    def __post_init__(self) -> None:
        # Special tokens have the highest ids.
        self._first_special = min(self.processor.tokenizer.added_tokens_decoder)

    def without_noise(self) -> C3DataCollator:
        """The same collator for evaluation: no noise, no teacher inputs."""
        return dataclasses.replace(self, token_noise=0.0, teacher_inputs=False)

    def __call__(self, items: Sequence[Sample | TrainingExample | Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of samples, or of records, see the class."""
        samples = [item if isinstance(item, Sample) else _as_sample(item) for item in items]
        batch = self._collate(samples)
        return batch if isinstance(items[0], Sample) else self._for_any_trainer(batch)

    def _for_any_trainer(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What of a batch goes into `forward(**batch)`, whose own loss goes with all logits."""
        if self.token_noise or self.teacher_inputs:
            raise ValueError(
                f"`token_noise` ({self.token_noise}) and `teacher_inputs` ({self.teacher_inputs}) are for samples of "
                "C3Trainer, got records. Leave both out."
            )
        counts = dict(zip(OUTCOMES, batch.pop("outcome_counts").tolist()))
        for outcome, limit in (("over_long_context", "max_context_tokens"), ("over_long_prompt", "max_prompt_tokens")):
            if counts[outcome]:
                logger.warning_once(
                    f"Examples are longer than `{limit}`, {getattr(self, limit)}: they are cut and carry no loss. "
                    "Give shorter ones, or raise the limit if the model has the positions."
                )
        del batch["logits_to_keep"]
        return batch

    def _collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        counts = dict.fromkeys(OUTCOMES, 0)
        counts["examples"] = len(samples)
        contexts, prompts, teachers = [], [], []
        for sample in samples:
            context_ids, prompt = self._encode(sample, counts)
            contexts.append(context_ids)
            prompts.append(prompt)
            if self.teacher_inputs:
                teachers.append(self._encode_teacher(sample.example, labelled=bool(prompt.has_labels)))
        pad = self.processor.tokenizer.pad_token_id
        multiple = self.pad_to_multiple_of
        labels = _pad([prompt.labels for prompt in prompts], _IGNORE, multiple)
        inputs = [self._with_noise(prompt, sample.key) for prompt, sample in zip(prompts, samples)]
        planned = max(sample.key.length for sample in samples)
        context_batch = _pad_contexts(contexts, planned, pad, multiple)
        batch = {
            **_pad_with_mask("", inputs, pad, multiple),
            "labels": labels,
            **context_batch,
            "logits_to_keep": _logits_to_keep(labels),
            "outcome_counts": torch.tensor([counts[name] for name in OUTCOMES]),
        }
        if self.latent_stride is not None:
            batch["context_strides"] = self._strides(context_batch["context_attention_mask"], samples[0].key)
        if self.teacher_inputs:
            batch |= _pad_with_mask("teacher_", [teacher.ids for teacher in teachers], pad)
            batch["teacher_labels"] = _pad([teacher.labels for teacher in teachers], _IGNORE)
        return batch

    def _encode(self, sample: Sample, counts: dict[str, int]) -> tuple[list[list[int]], _Prompt]:
        example = sample.example
        tokenizer = self.processor.tokenizer
        texts = [
            part["text"] for message in example.messages for part in message["content"] if part["type"] == "context"
        ]
        contexts = [self.processor.tokenize_context(text) for text in texts]
        for message, carries_loss in zip(example.messages, example.loss):
            if carries_loss:
                answer = "".join(part["text"] for part in message["content"])
                counts["empty_answer"] += not answer
                counts["literal_special_in_answer"] += any(word in answer for word in tokenizer.all_special_tokens)
        prompt = self._tokenize(example)
        long_context = any(len(ids) > self.max_context_tokens for ids in contexts)
        long_prompt = len(prompt.ids) > self.max_prompt_tokens
        counts["over_long_context"] += long_context
        counts["over_long_prompt"] += long_prompt
        if long_prompt:
            prompt, contexts = self._cut_prompt(prompt), []
        if long_context or long_prompt:
            prompt = prompt.without_labels()
        return [ids[: self.max_context_tokens] for ids in contexts], prompt

    def _strides(self, context_attention_mask: torch.Tensor, key: SampleKey) -> torch.Tensor:
        num_latents = self.processor.num_latents
        least = -(-context_attention_mask.sum(dim=-1) // num_latents)
        return least.clamp(min=key.stride, max=self.latent_stride)

    def _cut_prompt(self, prompt: _Prompt) -> _Prompt:
        # Without its contexts the prompt may end anywhere; what is left carries no loss and only fills its row.
        block = self.processor.tokenizer.convert_tokens_to_ids([CONTEXT_START_TOKEN, CONTEXT_TOKEN, CONTEXT_END_TOKEN])
        ids = [token for token in prompt.ids if token not in block][: self.max_prompt_tokens]
        return _Prompt(ids, [_IGNORE] * len(ids))

    def _encode_teacher(self, example: TrainingExample, labelled: bool) -> _Prompt:
        messages = tuple(
            {**message, "content": [{"type": "text", "text": "".join(part["text"] for part in message["content"])}]}
            for message in example.messages
        )
        prompt = self._tokenize(dataclasses.replace(example, messages=messages))
        return prompt if labelled else prompt.without_labels()

    def _tokenize(self, example: TrainingExample) -> _Prompt:
        """Ids and labels of the rendered conversation, tokenised in the pieces generation would see."""
        pieces, rendered = [], ""
        for number, carries_loss in enumerate(example.loss):
            if not carries_loss:
                continue
            is_open = example.is_open and number == len(example.messages) - 1
            before = self._render(example.messages[:number], add_generation_prompt=True)
            after = self._render(example.messages[: number + 1], False, continue_final_message=is_open)
            if not (before.startswith(rendered) and after.startswith(before)):
                raise ValueError(
                    "The chat template of the `processor` does not render a conversation as the beginning of a longer "
                    "one, so the answers cannot be told from the prompts. Use a template that only appends."
                )
            pieces += [before[len(rendered) :], after[len(before) :]]
            rendered = after
        prompt = _Prompt([], [])
        encoded = self.processor.reader.read_markup(pieces)
        for number, ids in enumerate(encoded):
            prompt.append(ids, labelled=number % 2 == 1)
        return prompt

    def _render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, continue_final_message: bool = False
    ) -> str:
        return self.processor.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def _with_noise(self, prompt: _Prompt, key: SampleKey) -> list[int]:
        if not self.token_noise or key.step < self.noise_from_step:
            return prompt.ids
        rng = np.random.default_rng([self.seed, 2, key.index])
        ids, labels = np.array(prompt.ids), np.array(prompt.labels)
        ordinary = (labels != _IGNORE) & (ids < self._first_special)
        noisy = ordinary & (rng.random(len(ids)) < rng.uniform(0, self.token_noise))
        return np.where(noisy, rng.integers(0, self._first_special, len(ids)), ids).tolist()


@dataclass
class _Prompt:
    """Token ids of one row and their labels, not shifted."""

    ids: list[int]
    labels: list[int]

    @property
    def has_labels(self) -> bool:
        return any(label != _IGNORE for label in self.labels)

    def append(self, ids: list[int], labelled: bool) -> None:
        self.ids += ids
        self.labels += ids if labelled else [_IGNORE] * len(ids)

    def without_labels(self) -> _Prompt:
        return _Prompt(self.ids, [_IGNORE] * len(self.ids))


def _as_sample(record: TrainingExample | Mapping[str, Any]) -> Sample:
    example = record if isinstance(record, TrainingExample) else parse_record(record)
    if isinstance(example, str):
        raise ValueError(
            f"A record for C3DataCollator needs `messages` or `conversations`, got the plain text {example[:40]!r}. "
            "c3-hf train makes tasks from plain text; elsewhere say what the reply to it is."
        )
    return Sample(example, SampleKey(0, 0))


def _pad(rows: Sequence[Sequence[int]], value: int, multiple: int = 1, length: int = 0) -> torch.Tensor:
    """Rows padded right to the longest, or `length`, rounded up to a multiple: `(len(rows), padded_length)`."""
    length = -(-max(length, *map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def _pad_with_mask(
    prefix: str, rows: Sequence[Sequence[int]], pad: int, multiple: int = 1, length: int = 0
) -> dict[str, torch.Tensor]:
    """Ids and attention mask of rows, under their names."""
    mask = [[1] * len(row) for row in rows]
    return {
        f"{prefix}input_ids": _pad(rows, pad, multiple, length),
        f"{prefix}attention_mask": _pad(mask, 0, multiple, length),
    }


def _pad_contexts(
    contexts: Sequence[Sequence[Sequence[int]]], length: int, pad: int, multiple: int
) -> dict[str, torch.Tensor]:
    num_contexts = max(1, *map(len, contexts))
    slots = [slot for row in contexts for slot in [*row, *[[]] * (num_contexts - len(row))]]
    # Where there are several they share the text of that length.
    length = length if num_contexts == 1 else 0
    padded = _pad_with_mask("context_", slots, pad, multiple, max(1, length))
    return {name: tensor.reshape(len(contexts), num_contexts, -1) for name, tensor in padded.items()}


def _logits_to_keep(labels: torch.Tensor) -> int:
    labelled = (labels != _IGNORE).any(dim=0).nonzero()
    first = int(labelled[0]) if len(labelled) else labels.shape[1] - 1
    return labels.shape[1] - first + 1
