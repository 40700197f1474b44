"""The losses: over labelled tokens, of the decoder against itself with the full text, and of the read-out.

The read-out: linear heads name, from each latent alone, the tokens of the text that it stands for. It tells the
encoder directly what a latent has to hold, without waiting for the decoder to learn where to look, and its accuracy
says within minutes whether a run will learn. The heads are no part of the model, nor saved with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from ..modeling.modeling_c3 import C3Model
from ..modeling.positions_c3 import resolve_strides


READOUT_FILE = "readout.safetensors"
# Where the heads hang in a model, so that every way of distributing it takes them along.
_NAME = "readout"


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
        teacher_inputs: `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels` of shape
            `(batch_size, teacher_length)`; row by row the same labels in the same order as `labels`.
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


class LatentReadout(nn.Module):
    """Heads on the latents of a model with a stride.

    Places are numbered from the end of a stretch, place 0 being its last token, so that what is known at one stride
    holds at every other. The heads name tokens by the encoder's own embedding table.

    Args:
        model: the body of the model that trains; the heads read its latents from now on.
        candidates: the heads choose among the words of the batch and so many others, drawn anew each time; `None` is
            the whole vocabulary, the product with which is most of the cost.

    Raises:
        ValueError: if the model has no `latent_stride`.
    """

    def __init__(self, model: C3Model, candidates: int | None = None) -> None:
        super().__init__()
        config = model.config
        if config.latent_stride is None:
            raise ValueError(
                "`readout_weight` needs a model with `latent_stride`: the tokens that a latent stands for are known "
                "by it. Set `latent_stride` in the recipe, or leave `readout_weight` out."
            )
        self.num_places = config.latent_stride
        self.candidates = candidates
        self.width = config.encoder_config.hidden_size
        self.heads = nn.Linear(config.text_config.hidden_size, self.num_places * self.width)
        nn.init.normal_(self.heads.weight, std=config.text_config.hidden_size**-0.5)
        nn.init.zeros_(self.heads.bias)
        self._result: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self, model: C3Model) -> None:
        """Read every batch of contexts that goes through the model while it trains."""
        setattr(model, _NAME, self)
        # A hook of the body, and not a loss over the outputs, so that it runs inside whatever wraps the whole model.
        self._hook = model.register_forward_hook(self._read, with_kwargs=True)

    def detach(self, model: C3Model) -> None:
        """Leave the model as it was before `attach`."""
        self._hook.remove()
        delattr(model, _NAME)

    def _read(self, model: C3Model, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any) -> None:
        if not model.training or inputs.get("context_input_ids") is None:
            return
        ids, latents = inputs["context_input_ids"], outputs["context_latents"]
        strides = resolve_strides(model.config, inputs.get("context_strides"), len(ids), ids.shape[1], latents.device)
        table = model.encoder.get_input_embeddings().weight
        self._result = self(latents, table, ids, inputs["context_attention_mask"], strides)

    def forward(
        self,
        latents: torch.Tensor,
        table: torch.Tensor,
        context_input_ids: torch.Tensor,
        context_attention_mask: torch.Tensor,
        context_strides: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the tokens out.

        Args:
            latents: `(batch_size, num_contexts, num_latents, text_hidden_size)`.
            table: the encoder's embeddings, `(vocab_size, encoder_hidden_size)`.
            context_input_ids, context_attention_mask: `(batch_size, num_contexts, context_length)`, padded right.
            context_strides: `(batch_size, num_contexts)`.

        Returns:
            Mean cross-entropy in float32, and the right and all tokens that were asked for: int64 of shape `(2,)`.
            With `candidates` both are among these.
        """
        num_latents = latents.shape[2]
        latents = latents.flatten(0, 1)
        ids, mask = context_input_ids.flatten(0, 1), context_attention_mask.flatten(0, 1)
        places = torch.arange(self.num_places, device=latents.device)
        ends = torch.arange(1, num_latents + 1, device=latents.device) * context_strides.reshape(-1, 1)
        # (contexts, latents, places): the token at a place of a latent's stretch.
        tokens = ends.unsqueeze(-1) - 1 - places
        lengths = mask.sum(dim=1).reshape(-1, 1, 1)
        asked = (places < context_strides.reshape(-1, 1, 1)) & (tokens < lengths)
        context, latent, place = asked.nonzero(as_tuple=True)
        targets = ids[context, tokens[context, latent, place]]
        if self.candidates is not None:
            others = torch.randint(len(table), (self.candidates,), device=targets.device)
            words, index = torch.cat([targets, others]).unique(return_inverse=True)
            table, targets = table[words], index[: len(targets)]
        most = int(context_strides.max())
        weight, bias = (part[: most * self.width] for part in (self.heads.weight, self.heads.bias))
        read = functional.linear(latents, weight.to(latents.dtype), bias.to(latents.dtype))
        read = read.unflatten(-1, (most, self.width))[context, latent, place]
        read = functional.layer_norm(read.float(), (self.width,))
        logits = functional.linear(read, table.to(read.dtype)).float()
        right = (logits.argmax(dim=-1) == targets).sum()
        counts = torch.stack([right, right.new_tensor(len(targets))])
        return functional.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets)), counts

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and counts of the last batch, see `forward`; they are given once."""
        if self._result is None:
            raise RuntimeError("No batch of contexts has gone through the model since the read-out was last taken.")
        result, self._result = self._result, None
        return result

    def save(self, folder: str | Path) -> None:
        """Write the heads into a checkpoint folder, for a run that goes on from it."""
        # As the rest of the folder, which moves into its place when it is whole.
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, Path(folder) / READOUT_FILE)

    def load(self, folder: str | Path) -> None:
        """Go on from `save`.

        Raises:
            FileNotFoundError: if the checkpoint has no heads, having been written by a run without them.
        """
        self.load_state_dict(load_file(Path(folder) / READOUT_FILE))


def without_readout(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The weights of the model alone."""
    return {name: value for name, value in state_dict.items() if f".{_NAME}." not in f".{name}"}
