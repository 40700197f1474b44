"""The losses: cross-entropy over the labelled tokens, and distillation from the decoder reading the full text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def token_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy in float32 over all labels other than -100 (the original's loss).

    Args:
        outputs: model output whose `logits` of shape `(batch_size, kept_length, vocab_size)` are those of the last
            positions (`logits_to_keep`).
        labels: `(batch_size, sequence_length)`, not shifted; positions before the kept ones hold -100.
        num_items_in_batch: labelled tokens of all micro-batches and processes of the optimizer step; the sum is
            divided by it. Without it, the mean over this micro-batch is returned.
    """
    targets = _kept_targets(outputs.logits, labels)
    total = functional.cross_entropy(
        outputs.logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / _count(targets, num_items_in_batch)


@torch.no_grad()
def count_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Labelled tokens that are the likeliest, and labelled tokens: int64 of shape `(2,)`. See `token_loss`."""
    targets = _kept_targets(logits, labels)
    counted = targets != -100
    right = (logits[:, :-1].argmax(dim=-1) == targets) & counted
    return torch.stack([right.sum(), counted.sum()])


def distillation_loss(
    model: nn.Module,
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_inputs: Mapping[str, torch.Tensor],
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """KL(teacher || student) over the labelled tokens; the teacher is the same decoder reading the contexts as text.

    Args:
        model: the model that trains; it runs once more without gradients, and without contexts.
        logits: the student's, see `token_loss`.
        labels: see `token_loss`.
        teacher_inputs: `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels` of shape
            `(batch_size, teacher_length)`; row by row the same labels in the same order as `labels`.
        num_items_in_batch: see `token_loss`.
    """
    teacher_labels = teacher_inputs["teacher_labels"]
    with torch.no_grad():
        teacher_logits = model(
            input_ids=teacher_inputs["teacher_input_ids"], attention_mask=teacher_inputs["teacher_attention_mask"]
        ).logits
    # The labelled tokens of both sequences are the same, so their logits line up when picked row by row.
    teacher = teacher_logits[:, :-1][teacher_labels[:, 1:] != -100].float()
    targets = _kept_targets(logits, labels)
    student = logits[:, :-1][targets != -100].float()
    total = functional.kl_div(
        functional.log_softmax(student, dim=-1),
        functional.log_softmax(teacher, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return total / _count(targets, num_items_in_batch)


def _kept_targets(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The labels that `logits[:, :-1]` predict, `(batch_size, kept_length - 1)`."""
    return labels[:, labels.shape[1] - logits.shape[1] + 1 :]


def _count(targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    if num_items_in_batch is not None:
        return num_items_in_batch
    return (targets != -100).sum().clamp(min=1)
