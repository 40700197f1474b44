"""The losses: over labelled tokens, of the decoder against itself with the full text, of read-out and look-up.

The read-out: linear heads name, from each latent alone, the tokens of the text that it stands for. It tells the
encoder directly what a latent has to hold, without waiting for the decoder to learn where to look, and its accuracy
says within minutes whether a run will learn. The heads are no part of the model, nor saved with it.

The look-up: some attention heads of the decoder are told to look at the latent of the token that comes next, which
they can find by the tokens in front of it. Restoring is learnt without it, as each token comes from a known distance;
finding a place by its words is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from ..modeling.configuration_c3 import C3Config
from ..modeling.modeling_c3 import C3Model
from ..modeling.positions_c3 import resolve_strides


READOUT_FILE = "readout.safetensors"
# Where the heads hang in a model, so that every way of distributing it takes them along.
_NAME = "readout"
# Float32 tells 1 from 1 - 6e-8; less attention than this is taken for as much.
_LEAST_SHARE = 1e-7


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
        before: tokens in front of its stretch that a latent names too, so that whoever knows these finds it. They
            take the places behind those of the stretch.

    Raises:
        ValueError: if the model has no `latent_stride`.
    """

    def __init__(self, model: C3Model, candidates: int | None = None, before: int = 0) -> None:
        super().__init__()
        config = model.config
        if config.latent_stride is None:
            raise ValueError(
                "`readout_weight` needs a model with `latent_stride`: the tokens that a latent stands for are known "
                "by it. Set `latent_stride` in the recipe, or leave `readout_weight` out."
            )
        self.num_places = config.latent_stride + before
        self.before = before
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
        # (contexts, latents, places): the token at a place of a latent's stretch, or in front of it.
        tokens = ends.unsqueeze(-1) - 1 - places
        lengths = mask.sum(dim=1).reshape(-1, 1, 1)
        strides = context_strides.reshape(-1, 1, 1)
        # A latent behind the end of the text stands for nothing and is asked for nothing.
        used = ends.unsqueeze(-1) - strides < lengths
        asked = (places < strides + self.before) & (tokens >= 0) & (tokens < lengths) & used
        context, latent, place = asked.nonzero(as_tuple=True)
        targets = ids[context, tokens[context, latent, place]]
        if self.candidates is not None:
            others = torch.randint(len(table), (self.candidates,), device=targets.device)
            words, index = torch.cat([targets, others]).unique(return_inverse=True)
            table, targets = table[words], index[: len(targets)]
        most = int(context_strides.max()) + self.before
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


def lookup_loss(
    attention: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    config: C3Config,
    num_places: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How little the heads look at the latents of the tokens that come next.

    It is asked for wherever a token and the labelled one behind it stand behind each other in a context as well, in
    whichever and however often. Each head has places of a latent (see [`LatentReadout`]), so that it finds tokens at
    these alone: with `num_places` P the n-th head the places that leave the rest of n when divided by P. If the second
    token stands at one of them, the head shall look at its latent, or at those; if not, at none. Nothing is asked for
    where a token stands in the reply as far behind the beginning as in the contexts: that is restoring, where heads
    would learn the distance instead.

    Args:
        attention: weights of the heads, `(batch_size, num_heads, kept_length, sequence_length)`, at the last positions
            (`logits_to_keep`).
        inputs: `input_ids` of shape `(batch_size, sequence_length)`; `context_input_ids` and
            `context_attention_mask`, `(batch_size, num_contexts, context_length)`, padded right; `context_strides`,
            `(batch_size, num_contexts)`.
        labels: `(batch_size, sequence_length)`, not shifted.
        config: of the model.
        num_places: places that are told apart, 1 to the number of heads, which is the default; with fewer several
            heads serve each and carry more of a token, with more each serves fewer.

    Returns:
        Mean of -log of the attention where it shall be, over heads that shall look at a latent and positions, and
        likewise over those that shall not: the sum of the two in float32, 0 if it is asked for nowhere. And how many
        of the former heads look most at a latent they shall, of how many: int64 of shape `(2,)`.
    """
    length, kept = labels.shape[1], attention.shape[2]
    num_heads, num_latents = attention.shape[1], config.num_latents
    num_places = num_heads if num_places is None else num_places
    token, following = inputs["input_ids"][:, length - kept : -1], labels[:, length - kept + 1 :]
    ids, mask = inputs["context_input_ids"], inputs["context_attention_mask"].bool()
    # (batch_size, kept_length - 1, num_contexts, context_length - 1): where in the contexts the two stand.
    found = (ids[:, None, :, :-1] == token[:, :, None, None]) & (ids[:, None, :, 1:] == following[:, :, None, None])
    found &= mask[:, None, :, 1:]
    at, strides = torch.arange(1, ids.shape[2], device=ids.device), inputs["context_strides"].unsqueeze(-1)
    lengths = mask.sum(dim=2, keepdim=True)
    in_contexts, in_reply = lengths.cumsum(dim=1) - lengths + at, (following != -100).cumsum(dim=1) - 1
    restored = (found & (in_contexts[:, None] == in_reply[:, :, None, None])).flatten(2).any(dim=2)
    found &= ~restored[:, :, None, None]
    # (batch_size, num_contexts, context_length - 1): the place of the second token, and its latent.
    number = (strides - 1 - at % strides) % num_places * num_latents + (at // strides).clamp(max=num_latents - 1)
    wanted = torch.zeros(*found.shape[:3], num_places * num_latents, dtype=torch.long, device=ids.device)
    wanted = wanted.scatter_add(3, number[:, None].expand(found.shape), found.long()).bool()
    # (batch_size, kept_length - 1, num_heads, latents of all contexts)
    wanted = wanted.unflatten(3, (num_places, num_latents)).transpose(2, 3).flatten(3)
    wanted = wanted[:, :, torch.arange(num_heads, device=ids.device) % num_places]
    # Where the latents stand in the prompt; a row with fewer contexts has fewer, and wants none of the others.
    is_latent = inputs["input_ids"] == config.context_token_id
    columns = (~is_latent).int().argsort(dim=1, stable=True)[:, : wanted.shape[3]]
    there = is_latent.gather(1, columns)[:, None, None]
    looked = attention[:, :, :-1].gather(3, columns[:, None, None].expand(-1, num_heads, kept - 1, -1)) * there
    # (positions, num_heads, latents), of the positions where it is asked for.
    asked = wanted.flatten(2).any(dim=2)
    wanted, looked = wanted[asked], looked.transpose(1, 2)[asked].float()
    looks = wanted.any(dim=2)
    right = wanted.gather(2, looked.argmax(dim=2, keepdim=True)).squeeze(2) & looks
    share = torch.where(looks, (looked * wanted).sum(dim=2), 1 - looked.sum(dim=2))
    missing = -share.clamp(min=_LEAST_SHARE).log()
    loss = sum(missing[chosen].sum() / chosen.sum().clamp(min=1) for chosen in (looks, ~looks))
    return loss, torch.stack([right.sum(), looks.sum()])
